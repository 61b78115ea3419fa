"""make lag-study: measure the cost of policy lag and the gain of its corrections in runs of `tiny/jpeg.toml`.

`--list` prints the runs. `--run` makes the missing ones. `--chart` plots them and prints a table.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.embedded_model import RECIPE
from benchmarks.lag_study_chart import MORE_WORK, draw_chart, table
from benchmarks.lag_study_costs import measure, read_costs
from benchmarks.study import StudyRun, list_or_make, read_results, study_parser

SEEDS = (10, 11, 12)  # those of the figures in docs/performance.md are not looked at here
IMAGES = 768
TASK = 16  # images a task, and an optimizer step
ROUND_IMAGES = {"large": 64, "middle": 32, "small": 16}  # 4, 2 and 1 optimizer steps a round
CORRECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "proximal": {"off_policy.ratio": "proximal"},
    "weight": {"off_policy.ratio": "proximal", "off_policy.importance_weight": 4e-3},  # as wide as the clip
    "mask": {"off_policy.max_drift_nats": 4.0},  # the clip range in nats
    "wide_clip": {"clip_range": 8e-3},
    "parts": {},  # trained on in four parts, each while the next one is sampled
}
PARTS = {"parts": 4}
COSTED = ("plain", *MORE_WORK)  # whose updates are timed side by side
# The most informative settings come first. Each tier runs with every seed before the next one starts.
TIERS: tuple[tuple[str, ...], ...] = (
    ("large-lag0-plain", "large-lag1-plain", "large-lag2-plain", "large-lag0-parts"),
    ("small-lag0-plain", "small-lag1-plain", "small-lag2-plain"),
    ("large-lag1-proximal", "large-lag2-proximal"),
    ("large-lag4-plain", "large-lag4-proximal", "large-lag1-mask", "large-lag1-weight"),
    ("large-lag1-wide_clip", "large-lag2-mask", "middle-lag1-plain"),
)


def setting_parts(setting: str) -> tuple[str, int, str]:
    """Return round size, lag and correction of a setting's name."""
    size, lag, correction = setting.split("-")
    return size, int(lag.removeprefix("lag")), correction


def run_of(setting: str, seed: int, images: int) -> StudyRun:
    """Return a run: `tiny/jpeg.toml` with the overrides of this setting."""
    size, lag, correction = setting_parts(setting)
    changes = {
        "max_policy_lag": lag,
        "rounds": images // ROUND_IMAGES[size],
        "sampling.batches_per_round": ROUND_IMAGES[size] // TASK,
        "runtime.threads": 1,
        "evaluation.split": "tuning",
        "learner.parts_per_round": PARTS.get(correction, 1),
        **{f"algorithm.{key}": value for key, value in CORRECTIONS[correction].items()},
    }
    overrides = tuple(word for key, value in changes.items() for word in (f"--{key}", str(value)))
    facts = {
        "round_images": ROUND_IMAGES[size],
        "tasks": ROUND_IMAGES[size] // TASK,
        "lag": lag,
        "parts": PARTS.get(correction, 1),
        "correction": correction,
    }
    return StudyRun(setting, seed, images, RECIPE, overrides, facts)


def all_runs(images: int) -> list[StudyRun]:
    """Return all runs of the study in order."""
    return [run_of(setting, seed, images) for tier in TIERS for seed in SEEDS for setting in tier]


def main() -> int:
    """List the runs, make them, or plot them."""
    parser = study_parser(__doc__, "lag_study")
    parser.add_argument("--images", type=int, default=IMAGES, help="images sampled in each run")
    parser.add_argument("--samplers", type=int, default=1, help="of the chart's wall-clock")
    parser.add_argument("--costs", type=Path, default=Path("docs/lag_study_costs.json"))
    options = parser.parse_args()
    if options.images < 1 or options.images % max(ROUND_IMAGES.values()):
        parser.error(f"--images is {options.images}: it must be a multiple of {max(ROUND_IMAGES.values())}")
    if options.run and not options.costs.exists():
        measure({name: run_of(f"large-lag1-{name}", SEEDS[0], options.images) for name in COSTED}, options.costs)
    if not options.chart:
        return list_or_make(options, all_runs(options.images))
    results = [result for result in read_results(options.results) if result["images"] == options.images]
    costs = read_costs(options.costs)
    draw_chart(results, options.image, options.samplers, costs)
    print(table(results, options.samplers, costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
