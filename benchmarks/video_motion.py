"""make video-motion: train a tiny Wan with random weights to move faster, with three seeds; print one row per seed.

All weights are trained with GRPO on the reward `motion`. The change is measured on 64 held-out clips by `ddpo evaluate`.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import machine
from ray_ddpo.common.metrics.statistics import in_errors
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.evaluate import STATS, evaluate
from ray_ddpo.train import run_training
from tests.tiny_families import policy_table
from tests.tiny_video import save_tiny_wan

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trained:
    """The motion of held-out clips before and after one run."""

    before: float
    after: float
    errors: float  # the change in paired standard errors
    seconds: float  # of training


def recipe_of(seed: int, folder: Path, model: Path) -> Recipe:
    """Return the recipe: 12 rounds of 32 clips of 5 frames at 16 × 16 pixels."""
    return Recipe.parse(
        {
            "name": f"motion-seed{seed}",
            "seed": seed,
            "output_dir": str(folder / "runs"),
            "rounds": 12,
            "policy": policy_table("wan", model, train="full"),
            "prompts": {"name": "animals", "images_per_prompt": 8},
            "sampling": {"num_steps": 4, "guidance_scale": 1.0, "eta": 0.7, "batch_size": 16, "batches_per_round": 2},
            "reward": {"name": "motion"},
            "algorithm": {"name": "grpo", "clip_range": 1e-2},
            "learner": {"batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3},
            "evaluation": {"images": 64, "batch_size": 16},
        }
    )


def trained(seed: int, folder: Path) -> Trained:
    """Train and evaluate one seed."""
    model = folder / "wan"
    if not model.exists():
        save_tiny_wan(model)
    recipe, start = recipe_of(seed, folder, model), time.perf_counter()
    run_training(recipe, serial=True)
    seconds, output = time.perf_counter() - start, folder / f"evaluation-seed{seed}"
    evaluate([recipe.run_path()], "pretrained", None, str(output), [])
    found = json.loads((output / STATS).read_text())["weights"][recipe.run_path()]["motion"]
    errors = in_errors(found["change"], found["paired_standard_error"])
    assert errors is not None, "clips do not all change alike"
    return Trained(found["before"], found["after"], errors, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/video-motion"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = {seed: trained(seed, folder) for seed in SEEDS}
    print(f"\n{machine()}\n\n| seed | motion before | after | change in paired standard errors | seconds of training |")
    print("|---|---|---|---|---|")
    for seed, row in rows.items():
        print(f"| {seed} | {row.before:.4f} | {row.after:.4f} | {row.errors:+.1f} | {row.seconds:.0f} |")


if __name__ == "__main__":
    main()
