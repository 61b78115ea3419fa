"""make algorithm-study: train the embedded model on 768 images with the earlier algorithms, three run seeds each.

`benchmarks/short_study.py` trains it with the later algorithms. `--list` prints the runs. `--run` makes the missing
ones. `--chart` plots them, writes the CSV and prints a table that includes the costs measured by
`algorithm_study_costs.py`.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.algorithm_study_costs import COSTS, read_costs
from benchmarks.lag_study_chart import by_setting, curve, draw_setting, share
from benchmarks.study import StudyRun, list_or_make, read_results, study_parser
from ray_ddpo.common.recipe.recipe import Recipe

SEEDS = (20, 21, 22)  # other seeds served to choose the recipes' numbers
ALGORITHMS = ("ddpo_is", "ddpo_sf", "dpok", "grpo", "rwr", "rwr_sparse", "diffusion_nft", "window")
SECONDS = "seconds of one process on one thread, by what an image costs under each algorithm"
Results = list[dict[str, Any]]


def run_of(name: str, seed: int) -> StudyRun:
    """Return the shipped recipe on one thread."""
    path = f"deploy/recipes/tiny/{name}.toml"
    recipe = Recipe.load(path)
    facts = {"round_images": recipe.images_per_round, "tasks": recipe.sampling.batches_per_round, "lag": 0}
    return StudyRun(name, seed, recipe.rounds * recipe.images_per_round, path, ("--runtime.threads", "1"), facts)


def all_runs() -> list[StudyRun]:
    """Return all runs in order: every algorithm once before the next seed."""
    return [run_of(name, seed) for seed in SEEDS for name in ALGORITHMS]


def draw_chart(results: Results, path: Path, costs: dict[str, float], seconds: str = SECONDS) -> None:
    """Plot the reward against images sampled (left) and against time (right), whose axis is named `seconds`."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    for index, (name, runs) in enumerate(by_setting(results).items()):
        color = plt.get_cmap("tab10")(index % 10)
        draw_setting(left, name, runs, 1.0, color)
        draw_setting(right, name, runs, costs[name], color)
    left.set_xlabel("images sampled")
    right.set_xlabel(seconds)
    for axis in (left, right):
        axis.set_ylabel("reward of the images that were learned from")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle("band: from the lowest to the highest of the seeds; line: their mean", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_csv(results: Results, path: Path, costs: dict[str, float]) -> None:
    """Write one row per point of the chart's curves."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("algorithm", "seed", "images", "seconds", "reward"))
        for name, runs in by_setting(results).items():
            for run in runs:
                for images, reward in zip(*curve(run), strict=True):
                    writer.writerow((name, run["seed"], int(images), f"{images * costs[name]:.1f}", f"{reward:.4f}"))


def table(results: Results, costs: dict[str, float]) -> str:
    """Return a Markdown table of the algorithms: change on held-out images, in paired standard errors."""
    lines = [
        "| recipe | images | change of the reward on held-out images | mean | fewest paired standard errors "
        "| still named | clipped | seconds an image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_setting(results).items():
        held_out = [run["held_out"] for run in runs]
        gains = [each["reward_after"] - each["reward_before"] for each in held_out]
        changes = [100 * gain / abs(each["reward_before"]) for gain, each in zip(gains, held_out, strict=True)]
        errors = min(gain / each["paired_standard_error"] for gain, each in zip(gains, held_out, strict=True))
        each_seed = ", ".join(f"{change:+.1f}" for change in changes)
        named = ", ".join(f"{each['scorers']['animal_classifier']['kept']:.2f}" for each in held_out)
        lines.append(
            f"| `{name}` | {runs[0]['images']:,} | {each_seed} % | {np.mean(changes):+.1f} % | {errors:.1f} | {named} "
            f"| {share(runs, 'clip_fraction')} | {costs[name]:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """List the runs, make them, or plot them."""
    options = study_parser(__doc__, "algorithm_study").parse_args()
    if not options.chart:
        return list_or_make(options, all_runs())
    results, costs = read_results(options.results), read_costs(COSTS)
    draw_chart(results, options.image, costs)
    write_csv(results, options.results.with_suffix(".csv"), costs)
    print(table(results, costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
