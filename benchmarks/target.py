"""make bench-target: minutes of training until held-out images are as good as TRL's are at its end.

Each side trains alone on the machine. The clock starts with the loaded model and includes everything that the training
process does, compilation too. Versions are sampled and scored afterwards. `--stage` repeats one part.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.against_trl import FOLDER, TRL, trl_job, words
from benchmarks.embedded_model import RECIPE
from benchmarks.held_out import Evaluator
from benchmarks.round_process import trl_process
from benchmarks.target_results import OURS, Point, draw_chart, read_points, table, write_points
from benchmarks.timing import machine
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.checkpoints.checkpoint import MANIFEST, load_weights

FAST = "deploy/recipes/tiny/fast.toml"
SEEDS = (0, 1, 2)
TUNING = ("--seeds", "10", "--evaluation.split", "tuning")  # by which numbers are chosen
TRL_ROUNDS = 8
TRL_KEYS = {  # `tiny/jpeg.toml` in TRL's form: all steps, statistics per prompt
    "sampling.timestep_fraction": "1.0",
    "sampling.skip_last_steps": "0",
    "learner.learning_rate": "1e-2",  # TRL's best of 4e-3, 6e-3 and 1e-2
    "learner.micro_batch_size": "16",  # equal to TRL's train_batch_size
    "rounds": str(TRL_ROUNDS),
}
HELD_OUT = {"evaluation.images": "90"}  # sampled as TRL samples: all 15 steps with noise
VERSIONS_APART = 2  # between two that are evaluated, but for the one before the target is reached


@dataclass(frozen=True)
class Version:
    """A version that one side has trained; `seconds` is the time on the side's clock."""

    side: str
    seed: int
    round: int
    seconds: float
    file: Path  # TRL's adapters, or our checkpoint

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the adapters by their names in the network."""
        if self.side == TRL:
            return load_file(self.file)
        return load_weights(RunFolder(self.file).storage)[-1].arrays()


def trl_recipe(seed: int, overrides: list[str]) -> Recipe:
    """Return TRL's configuration as a recipe."""
    return Recipe.load(RECIPE, [*words(TRL_KEYS), "--seed", str(seed), *overrides])


def train_trl(seed: int, folder: Path, overrides: list[str]) -> None:
    """Run TRL's rounds. Save each version's adapters and time."""
    place, recipe, times = folder / f"trl-seed{seed}", trl_recipe(seed, overrides), []
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with trl_process(trl_job(build_components(recipe)), place) as process:
        process.answer()
        started = time.perf_counter()
        for round_index in range(1, recipe.rounds + 1):
            answer = process.ask(save=str((place / f"{round_index:06d}.safetensors").absolute()))
            times.append(time.perf_counter() - started)
            (place / "times.json").write_text(json.dumps(times))
            say(f"TRL, seed {seed}, round {round_index}: {times[-1]:.0f} s, reward {answer['reward']:.3f}")


def train_ours(seed: int, folder: Path, overrides: list[str]) -> None:
    """Run `ddpo train` as a user would, with a checkpoint each round."""
    place = folder / f"ours-seed{seed}"
    shutil.rmtree(place, ignore_errors=True)
    kept = {"checkpoint.every": "1", "checkpoint.keep": "1000", "seed": str(seed), "output_dir": str(folder)}
    command = [
        sys.executable,
        "-m",
        "ray_ddpo",
        "train",
        FAST,
        "--serial",
        *words(kept, {"name": place.name}),
        *overrides,
    ]
    # Otherwise an earlier run's compilation would be free.
    shutil.rmtree(folder / "compiled", ignore_errors=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str((folder / "compiled").absolute())}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    say(f"ours, seed {seed}: {versions(OURS, seed, folder)[-1].seconds:.0f} s")


def versions(side: str, seed: int, folder: Path) -> list[Version]:
    """Return the versions of a side, oldest first."""
    if side == TRL:
        place = folder / f"trl-seed{seed}"
        times = enumerate(json.loads((place / "times.json").read_text()), 1)
        return [
            Version(side, seed, round_index, seconds, place / f"{round_index:06d}.safetensors")
            for round_index, seconds in times
        ]
    run = folder / f"ours-seed{seed}"
    started = (run / RunFolder.recipe).stat().st_mtime  # written when the models are loaded, before anything is sampled
    checkpoints = sorted((run / "checkpoints").glob("round-*"))
    return [
        Version(side, seed, int(file.name[6:]), (file / MANIFEST).stat().st_mtime - started, file)
        for file in checkpoints
    ]


def evaluate(seeds: list[int], folder: Path, overrides: list[str]) -> Iterator[Point]:
    """Evaluate every second version and the last, and on each side the version before the target was reached.

    TRL comes first, because its last version sets the target.
    """
    held_out = Evaluator(trl_recipe(0, [*words(HELD_OUT), *overrides]))
    before = held_out.worth(None)
    for seed in seeds:
        target = None
        for side in (TRL, OURS):
            yield Point(side, seed, 0, 0.0, before.reward, before.top1)
            of_side, seen = versions(side, seed, folder), []
            for version in of_side[::-VERSIONS_APART][::-1]:
                seen.append(point_of(version, held_out))
                yield seen[-1]
            target = seen[-1].reward if target is None else target
            reached = next((each.round for each in seen if each.reward >= target), None)
            if reached is not None and reached > 1:
                yield point_of(of_side[reached - 2], held_out)


def point_of(version: Version, held_out: Evaluator) -> Point:
    """Return the version's point on the chart."""
    worth = held_out.worth(version.arrays())
    point = Point(version.side, version.seed, version.round, version.seconds, worth.reward, worth.top1)
    say(f"{version.side}, seed {version.seed}, round {version.round}: {worth.reward:.3f}, top1 {worth.top1:.2f}")
    return point


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Train, evaluate and print. Unknown options override the recipe of the side that is trained or evaluated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("all", "trl", "ours", "evaluate", "table"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=FOLDER / "target")
    parser.add_argument("--chart", type=Path, help="where to draw the curves")
    options, overrides = parser.parse_known_args()
    results, only = options.folder / "target.csv", overrides if options.stage != "all" else []
    if options.stage == "all" and overrides:
        parser.error(f"{overrides} would go to both sides: give them with --stage trl, ours or evaluate")
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        if options.stage in ("all", "trl"):
            train_trl(seed, options.folder, only)
        if options.stage in ("all", "ours"):
            train_ours(seed, options.folder, only)
    if options.stage in ("all", "evaluate"):
        write_points(evaluate(options.seeds, options.folder, only), results, machine())
    if options.stage in ("all", "evaluate", "table"):
        points, of_machine = read_points(results)
        print(f"{table(points)}\n\n{of_machine}")
        if options.chart:
            draw_chart(points, options.chart)


if __name__ == "__main__":
    main()
