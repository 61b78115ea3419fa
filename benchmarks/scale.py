"""make scale: measure the overhead of a round as one size varies at a time, and fit lines."""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.scale_fit import Measured, chart, costs_table, fitted, on_paper_table, table
from benchmarks.scale_stand_ins import Setting
from benchmarks.timing import machine

ROUNDS = 3
FOLDER = Path("runs/scale")
SECONDS_A_SETTING = 300  # at most
MANY_TASKS = 4096  # images a round: 512 tasks, two for each of the most samplers
AXES: dict[str, list[Setting]] = {
    "images": [Setting(images=images) for images in (64, 256, 1024, 4096, 16384)],
    "images_per_task": [Setting(images=256 * size, images_per_task=size, pixels=64) for size in (1, 16, 64)],
    "steps": [Setting(steps=steps) for steps in (1, 10, 50)],
    "pixels": [Setting(pixels=pixels) for pixels in (64, 128, 512)],
    "samplers": [
        Setting(MANY_TASKS, samplers=samplers, busy_seconds=2, uneven=True) for samplers in (1, 4, 16, 64, 256)
    ],
    "processes": [Setting(2048, samplers=32, processes=processes) for processes in (1, 8, 32)],
    "ranks": [Setting(2048, ranks=ranks) for ranks in (1, 8, 64)],
    "weight_bytes": [Setting(weight_bytes=size) for size in (1_000, 1_000_000, 20_000_000, 200_000_000)],
}
SHORT = {
    "images": [Setting(images=64), Setting(images=512)],
    "samplers": [Setting(512, samplers=2), Setting(512, samplers=64)],
}


def measured(axis: str, setting: Setting, rounds: int) -> Measured:
    """Measure a setting in a fresh process."""
    asked = json.dumps({"setting": dataclasses.asdict(setting), "rounds": rounds})
    command = [sys.executable, "-m", "benchmarks.scale_run"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS_A_SETTING)
    if done.returncode:
        raise RuntimeError(f"{asked} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured.of(axis, setting, json.loads(done.stdout.splitlines()[-1]))


def write(folder: Path, found: list[Measured]) -> None:
    """Write `scale.csv`: one line per setting, with the machine that measured it."""
    where = {"machine": machine(), **{name: version(name) for name in ("ray", "numpy", "torch")}}
    rows: list[dict[str, Any]] = [{**each.row, **where} for each in found]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Print the tables, and write tables and chart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--short", action="store_true", help="two axes, two settings each")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    axes = SHORT if options.short else {axis: AXES[axis] for axis in options.axes}
    found = []
    for axis, settings in axes.items():
        for setting in settings:
            found.append(measured(axis, setting, options.rounds))
            write(options.folder, found)  # as it goes: a setting that fails takes none of the others with it
            print(f"{axis} {getattr(setting, axis):,}: {found[-1].cost}", file=sys.stderr, flush=True)
    print(f"{machine()}, ray {version('ray')}; {options.rounds} rounds a setting after the first\n\n{table(found)}")
    costs = fitted(found)
    print(f"\n{costs_table(costs)}\n\n{on_paper_table(costs)}")
    chart(options.folder / "scale.png", machine(), found)
    print(f"\n{options.folder / 'scale.csv'}")


if __name__ == "__main__":
    main()
