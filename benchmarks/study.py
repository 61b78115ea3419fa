"""Shared parts of studies: runs of similar recipes, sequential or parallel, with one line of results each."""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import machine

KEPT = ("reward/mean", "seconds/sample", "seconds/score", "seconds/learn", "lag/max", "clip_fraction", "kl_nats")
ALSO_KEPT = ("ratio/max_abs_log", "masked_fraction", "importance_weight/mean", "kl_reference_nats")


@dataclass(frozen=True)
class StudyRun:
    """One run: a recipe with overrides and a run seed, and further facts for its line of results."""

    setting: str
    seed: int
    images: int
    recipe: str
    overrides: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.setting}-seed{self.seed}-{self.images}images"


Maker = Callable[[StudyRun, Path], dict[str, Any]]  # trains a run in a folder and returns its line of results


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the existing results, one line per run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make(run: StudyRun, folder: Path) -> dict[str, Any]:
    """Train and report in separate processes, resuming an earlier attempt. Return the run's line."""
    placed = ["--seed", str(run.seed), "--name", run.name, "--output_dir", str(folder)]
    train = ["train", run.recipe, "--serial", "--resume", "auto", *placed, *run.overrides]
    with (folder / f"{run.name}.log").open("a") as log:
        for command in (train, ["report", str(folder / run.name)]):
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "ray_ddpo", *command]
            subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    rounds = [json.loads(line) for line in (folder / run.name / "metrics.jsonl").read_text().splitlines()]
    return {
        "setting": run.setting,
        "seed": run.seed,
        "images": run.images,
        **run.facts,
        "overrides": list(run.overrides),
        "rounds": [shortened(metrics) for metrics in rounds],
        "held_out": json.loads((folder / run.name / "report" / "summary.json").read_text()),
        "machine": machine(),
    }


def shortened(metrics: dict[str, float | None]) -> dict[str, float]:
    """Return the metrics of a round that studies use, with five digits."""
    kept = {key: metrics[key] for key in (*KEPT, *ALSO_KEPT) if key in metrics}
    return {key: float(f"{value:.5g}") for key, value in kept.items() if value is not None}


def make_all(runs: list[StudyRun], folder: Path, results: Path, jobs: int, make_one: Maker = make) -> int:
    """Make runs in parallel and append each line as its run ends. Return the number of failures."""
    lock, failed = threading.Lock(), []

    def one(run: StudyRun) -> None:
        print(f"{run.name} begins", flush=True)
        try:
            line = json.dumps(make_one(run, folder))
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


def study_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return the command line of a study whose results are docs/<name>.jsonl and docs/<name>.png."""
    parser = argparse.ArgumentParser(description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    for verb in ("list", "run", "chart"):
        what.add_argument(f"--{verb}", action="store_true")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names, such as '*-seed10-*'")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each has one thread")
    parser.add_argument("--folder", type=Path, default=Path(f"runs/{name}"))
    parser.add_argument("--results", type=Path, default=Path(f"docs/{name}.jsonl"))
    parser.add_argument("--image", type=Path, default=Path(f"docs/{name}.png"))
    return parser


def list_or_make(options: argparse.Namespace, runs: list[StudyRun], make_one: Maker = make) -> int:
    """Print the requested runs, or make the missing ones with `make_one`. Return the number of failures."""
    runs = [run for run in runs if fnmatch.fnmatch(run.name, options.only + "*")]
    results = read_results(options.results)
    done = {(result["setting"], result["seed"], result["images"]) for result in results}
    left = [run for run in runs if (run.setting, run.seed, run.images) not in done]
    if options.list:
        for run in runs:
            print(f"{'    ' if run in left else 'done'} {run.name:<44} {run.recipe} {' '.join(run.overrides)}")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    return make_all(left, options.folder, options.results, options.jobs, make_one)
