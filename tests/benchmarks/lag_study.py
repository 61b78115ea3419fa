"""make lag-study: what a lagging policy costs, and what makes up for it, in runs of the demo that differ in nothing else.

`--list` prints the runs, `--run` makes those that the results do not have yet, `--chart` draws them and prints a table.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.embedded_model import RECIPE, machine
from tests.benchmarks.lag_study_chart import draw_chart, table

SEEDS = (10, 11, 12)  # those of the demo's figures are not looked at here
IMAGES = 768
TASK = 16  # images a task, and an optimizer step
ROUND_IMAGES = {"large": 64, "middle": 32, "small": 16}  # 4, 2 and 1 optimizer steps a round
CORRECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "proximal": {"off_policy.ratio": "proximal"},
    "weight": {"off_policy.ratio": "proximal", "off_policy.behaviour_weight": 4e-3},  # as wide as the clip
    "mask": {"off_policy.max_drift_nats": 4.0},  # the clip range in nats
    "wide_clip": {"clip_range": 8e-3},
    "parts": {},  # learned from in four parts, each while the next is drawn
}
PARTS = {"parts": 4}
# What tells most comes first; each line is made with every seed before the next begins.
TIERS: tuple[tuple[str, ...], ...] = (
    ("large-lag0-plain", "large-lag1-plain", "large-lag2-plain", "large-lag0-parts"),
    ("small-lag0-plain", "small-lag1-plain", "small-lag2-plain"),
    ("large-lag1-proximal", "large-lag2-proximal"),
    ("middle-lag0-plain", "middle-lag1-plain", "large-lag1-mask", "large-lag1-weight"),
    ("large-lag4-plain", "small-lag4-plain", "large-lag4-proximal", "large-lag1-wide_clip"),
    ("large-lag4-mask", "large-lag2-mask", "small-lag4-mask"),
)
KEPT = ("reward/mean", "seconds/sample", "seconds/score", "seconds/learn", "lag/max", "clip_fraction", "kl_nats")
ALSO_KEPT = ("ratio/max_abs_log", "masked_fraction", "behaviour_weight/mean")


@dataclass(frozen=True)
class Run:
    """One run of the study, and how many pictures it draws."""

    setting: str
    seed: int
    images: int

    @property
    def name(self) -> str:
        return f"{self.setting}-seed{self.seed}-{self.images}images"

    @property
    def parts(self) -> tuple[str, int, str]:
        """Round size, lag and correction."""
        size, lag, correction = self.setting.split("-")
        return size, int(lag.removeprefix("lag")), correction

    @property
    def overrides(self) -> list[str]:
        """What differs from the demo's recipe."""
        size, lag, correction = self.parts
        changes = {
            "max_policy_lag": lag,
            "rounds": self.images // ROUND_IMAGES[size],
            "sampling.batches_per_round": ROUND_IMAGES[size] // TASK,
            "runtime.threads": 1,
            "evaluation.split": "tuning",
            "learner.parts_per_round": PARTS.get(correction, 1),
            **{f"algorithm.{key}": value for key, value in CORRECTIONS[correction].items()},
        }
        return [word for key, value in changes.items() for word in (f"--{key}", str(value))]


def all_runs(images: int) -> list[Run]:
    """The whole study in its order."""
    return [Run(setting, seed, images) for tier in TIERS for seed in SEEDS for setting in tier]


def read_results(path: Path) -> list[dict[str, Any]]:
    """What is there already, a line a run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make(run: Run, folder: Path) -> dict[str, Any]:
    """Train and report in processes of their own, going on where an earlier attempt stopped; the run's line."""
    placed = ["--seed", str(run.seed), "--name", run.name, "--output_dir", str(folder)]
    train = ["train", RECIPE, "--serial", "--resume", "auto", *placed, *run.overrides]
    with (folder / f"{run.name}.log").open("a") as log:
        for command in (train, ["report", str(folder / run.name)]):
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "ddpo", *command]
            subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    rounds = [json.loads(line) for line in (folder / run.name / "metrics.jsonl").read_text().splitlines()]
    size, lag, correction = run.parts
    return {
        **asdict(run),
        "round_images": ROUND_IMAGES[size],
        "tasks": ROUND_IMAGES[size] // TASK,
        "lag": lag,
        "parts": PARTS.get(correction, 1),
        "correction": correction,
        "overrides": run.overrides,
        "rounds": [shortened(metrics) for metrics in rounds],
        "held_out": json.loads((folder / run.name / "report" / "summary.json").read_text()),
        "machine": machine(),
    }


def shortened(metrics: dict[str, float]) -> dict[str, float]:
    """What the study looks at of a round, to five digits."""
    return {key: float(f"{metrics[key]:.5g}") for key in (*KEPT, *ALSO_KEPT) if key in metrics}


def make_all(runs: list[Run], folder: Path, results: Path, jobs: int) -> int:
    """Make runs side by side and add each one's line as it ends; how many failed."""
    lock, failed = threading.Lock(), []

    def one(run: Run) -> None:
        print(f"{run.name} begins", flush=True)
        try:
            line = json.dumps(make(run, folder))
        except subprocess.CalledProcessError as error:
            failed.append(run)
            print(f"{run.name} failed: {error}; its log is {folder / run.name}.log", flush=True)
            return
        with lock, results.open("a") as file:
            file.write(line + "\n")
        print(f"{run.name} is done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))
    return len(failed)


def main() -> int:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    for verb in ("list", "run", "chart"):
        what.add_argument(f"--{verb}", action="store_true")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names, such as 'large-lag1-*'")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each has one thread")
    parser.add_argument("--images", type=int, default=IMAGES, help="pictures drawn in each run")
    parser.add_argument("--samplers", type=int, default=1, help="of the chart's wall-clock")
    parser.add_argument("--folder", type=Path, default=Path("runs/lag_study"))
    parser.add_argument("--results", type=Path, default=Path("docs/lag_study.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/lag_study.png"))
    options = parser.parse_args()
    if options.images < 1 or options.images % max(ROUND_IMAGES.values()):
        parser.error(f"--images is {options.images}: it must be a multiple of {max(ROUND_IMAGES.values())}")
    runs = [run for run in all_runs(options.images) if fnmatch.fnmatch(run.name, options.only + "*")]
    results = [result for result in read_results(options.results) if result["images"] == options.images]
    done = {(result["setting"], result["seed"]) for result in results}
    if options.list:
        for run in runs:
            mark = "done" if (run.setting, run.seed) in done else "    "
            print(f"{mark} {run.name:<44} {' '.join(run.overrides)}")
        return 0
    if options.run:
        options.folder.mkdir(parents=True, exist_ok=True)
        left = [run for run in runs if (run.setting, run.seed) not in done]
        return make_all(left, options.folder, options.results, options.jobs)
    draw_chart(results, options.picture, options.samplers)
    print(table(results, options.samplers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
