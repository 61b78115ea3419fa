"""make short-study: a few hundred images of each of these algorithms, three run seeds each, timed by process time.

A run is one process on one thread. It evaluates the pretrained model and its last version on held-out images. Other
programs on the machine do not count in process time. `--list` prints the runs. `--run` makes the missing ones.
`--chart` plots them and prints the tables of docs/algorithms.md and docs/differentiable_rewards.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.algorithm_study import SEEDS, draw_chart
from benchmarks.lag_study_chart import by_setting
from benchmarks.short_study_tables import cost, gradient_table, held_out_table
from benchmarks.study import StudyRun, list_or_make, read_results, shortened, study_parser
from benchmarks.timing import machine
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.scores import headline, share_kept
from ray_ddpo.deploy.evaluation.eval_log import EvalLog

IMAGES = 45  # held-out images: one of each animal
HELD_OUT = ("--evaluation.images", str(IMAGES))
JPEG = (
    "fast",
    "grpo_guard",
    "gardo",
    "flow_dppo",
    "mixgrpo",
    "awm",
    "sft",
    "dpo",
    "dgpo",
    "dpok",
    "dpok_value",
)  # `fast` is GRPO
GRADIENT = ("draft", "fast_colourfulness", "alignprop", "refl")
SHORTENED = {  # the recipe in tiny/, and its overrides
    "fast": ("fast", ("--rounds", "5")),
    "fast_colourfulness": ("fast", ("--rounds", "5", "--reward.name", "colourfulness")),  # DRaFT trains on this reward
    "dpok": ("dpok", ("--rounds", "5")),
    "dpok_value": ("dpok", ("--rounds", "5", "--algorithm.value", "{}")),  # with the value baseline
}


def run_of(setting: str, seed: int) -> StudyRun:
    """Return a shipped recipe on one thread, with an evaluation of its last version."""
    name, given = SHORTENED.get(setting, (setting, ()))
    path = f"deploy/recipes/tiny/{name}.toml"
    recipe = Recipe.load(path, list(given))
    words = ("--runtime.threads", "1", "--evaluation.every", str(recipe.rounds), *HELD_OUT, *given)
    facts = {"round_images": recipe.images_per_round, "algorithm": recipe.algorithm.name}
    return StudyRun(setting, seed, recipe.rounds * recipe.images_per_round, path, words, facts)


def all_runs() -> list[StudyRun]:
    """Return all runs in order: every algorithm once before the next seed."""
    return [run_of(setting, seed) for seed in SEEDS for setting in (*JPEG, *GRADIENT)]


def jpeg_runs() -> list[StudyRun]:
    """Return the runs against JPEG size, which are compared with each other."""
    return [run for run in all_runs() if run.setting in JPEG]


def make(run: StudyRun, folder: Path) -> dict[str, Any]:
    """Train in a process of its own, and return the run's line."""
    placed = ["--seed", str(run.seed), "--name", run.name, "--output_dir", str(folder)]
    command = [sys.executable, "-m", "ray_ddpo", "train", run.recipe, "--serial", *placed, *run.overrides]
    with (folder / f"{run.name}.log").open("w") as log:
        after_rounds = process_seconds(command, log)
    rounds = [json.loads(line) for line in (folder / run.name / "metrics.jsonl").read_text().splitlines()]
    per_round = [after - before for before, after in zip(after_rounds, after_rounds[1:], strict=False)]
    return {
        "setting": run.setting,
        "seed": run.seed,
        "images": run.images,
        **run.facts,
        "overrides": list(run.overrides),
        # The first round is left out: it follows the evaluation of the pretrained model.
        "process_seconds_per_image": round(median(per_round) / run.facts["round_images"], 4),
        "rounds": [shortened(metrics) for metrics in rounds],
        "held_out": held_out(folder / run.name),
        "machine": machine(),
    }


def process_seconds(command: list[str], log: Any) -> list[float]:
    """Run a training and return the seconds of CPU that its process had used at the end of each round.

    Raises:
        subprocess.CalledProcessError: the training failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith("round "):
                used = psutil.Process(process.pid).cpu_times()
                found.append(used.user + used.system)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def held_out(location: Path) -> dict[str, Any]:
    """Return what the evaluations of a run found: means, paired standard errors, image statistics, and alarms."""
    folder = RunFolder(location)
    log = EvalLog(folder.storage)
    first, last = (log.entries()[index] for index in (0, -1))
    scores = [log.scores(entry["policy_version"]) for entry in (first, last)]
    recipe = Recipe.load(location / folder.recipe)
    reward, scorer = headline(recipe), recipe.evaluation.scorers[0].called
    change = last["scores"][reward]
    return {
        "reward_before": first["scores"][reward]["mean"],
        "reward_after": change["mean"],
        "paired_standard_error": change["standard_error"],
        "images_compared": last["images"],
        "named_before": first["scores"][scorer]["mean"],
        "named_after": last["scores"][scorer]["mean"],
        "kept": share_kept(scores[0][scorer], scores[1][scorer]),
        "statistics_before": first["image_statistics"],
        "statistics_after": last["image_statistics"],
        "alarms": [alarm["says"] for alarm in last["alarms"]],
    }


def main() -> int:
    """List the runs, make them, or plot them."""
    options = study_parser(__doc__, "short_study").parse_args()
    if not options.chart:
        return list_or_make(options, all_runs(), make)
    results = read_results(options.results)
    shown = [each for each in results if each["setting"] in JPEG]
    costs = {name: cost(runs) for name, runs in by_setting(shown).items()}
    draw_chart(shown, options.image, costs, "seconds of process time on one thread")
    print(held_out_table([each for each in results if each["setting"] in JPEG]))
    print(gradient_table([each for each in results if each["setting"] in GRADIENT]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
