"""make three-steps: sample a pretrained model, fit a head on rated images, and train against that head.

The ratings come from a known taste, warm colours, so the result can be compared with the truth. Simulated voters rate
with noise. CLIP has random weights, which still distinguish colours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from benchmarks.small_copy import small_copy
from benchmarks.timing import machine
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.driver.components import build_components
from tests.rated_images import warmth, write_csv
from tests.tiny_clip import save_tiny_clip

RECIPE = "deploy/recipes/tiny/three_steps.toml"
IMAGES, BATCH = 405, 15  # nine of each animal
SCORERS = (
    '[{name = "function", path = "benchmarks.three_steps:warmth_of"}, {name = "animal_classifier", measure = "top1"}]'
)
VOTERS, SPREAD = 20, 1.5  # voters per image, and their deviation
IMAGE_WIDTH = 1000  # of the before/after image for the documentation


def warmth_of(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
    """Return the true taste of each image, as a scorer that is not trained on."""
    return np.array([warmth(image) for image in images], dtype=np.float32)


def sample_images(folder: Path, recipe: Recipe) -> list[Path]:
    """Sample images of the pretrained model. New adapters do not change its output."""
    components = build_components(recipe)
    policy = components.policy.load(settle(recipe.runtime), recipe.sampling, "sampler")
    animals, paths = components.prompts.listed(), []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, IMAGES, BATCH):
        seeds = list(range(first, first + BATCH))
        trajectory = sample_trajectories(
            policy, [animals[seed % len(animals)] for seed in seeds], seeds, recipe.sampling
        )
        for seed, pixels in zip(seeds, policy.decode(trajectory.final_latents).cpu().numpy(), strict=True):
            paths.append(folder / f"{seed:04d}-{animals[seed % len(animals)]}.png")
            Image.fromarray(pixels).save(paths[-1])
    return paths


def vote(tastes: Float[np.ndarray, "N"], seed: int) -> Int[np.ndarray, "N 10"]:
    """Return counts of the ratings 1 … 10 by voters who agree about the order and differ by noise."""
    generator = np.random.default_rng(seed)
    wanted = 5.5 + 1.5 * (tastes - tastes.mean()) / tastes.std()
    votes = generator.normal(wanted[:, None], SPREAD, (len(tastes), VOTERS)).round().clip(1, 10).astype(int)
    return np.stack([np.bincount(row, minlength=11)[1:] for row in votes])


def rate(paths: list[Path], table: Path, seed: int) -> None:
    """Write the table of rated images: paths, and votes per rating."""
    votes = vote(np.array([warmth(np.asarray(Image.open(path))) for path in paths]), seed)
    counts = {f"votes_{rating}": votes[:, rating - 1].tolist() for rating in range(1, 11)}
    write_csv(table, {"path": [path.name for path in paths], **counts})


def ddpo(*words: str) -> None:
    """Run a ddpo command in a separate process."""
    print(f"\n$ ddpo {' '.join(words)}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "ray_ddpo", *words], check=True, env=environment)


def table(summary: dict[str, Any], fitted: dict[str, Any], seconds: dict[str, float]) -> str:
    """Return the results as Markdown."""
    test, scorers = fitted["splits"]["test"], summary["scorers"]
    gain = summary["reward_after"] - summary["reward_before"]
    warm, animal = scorers["function"], scorers["animal_classifier"]
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return "\n".join(
        [
            f"head: {test['images']} test images, SRCC {test['srcc']:.3f}, PLCC {test['plcc']:.3f}, "
            f"MSE {test['mse']:.2f} (of the mean {test['mse_of_mean']:.2f})",
            "",
            f"| on {summary['images_compared']} held-out images | before | after |",
            "|---|---|---|",
            f"| rating by the head | {summary['reward_before']:.2f} | {summary['reward_after']:.2f} "
            f"({gain / summary['paired_standard_error']:+.1f} paired standard errors) |",
            f"| warmth, the true taste | {warm['before']:.3f} | {warm['after']:.3f} |",
            f"| named by the animal classifier | {animal['before']:.2f} | {animal['after']:.2f} |",
            "",
            f"{took}; {machine()}",
        ]
    )


def main() -> None:
    """Run all three steps. Unknown options override the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/three-steps"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="where to put a small before/after image")
    options, overrides = parser.parse_known_args()
    folder, seconds, start = options.folder, {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - start - sum(seconds.values())

    paths = sample_images(folder / "images", Recipe.load(RECIPE, overrides))
    lap("sampling")
    rate(paths, folder / "ratings.csv", options.seed)
    clip, fitted = save_tiny_clip(folder / "clip"), folder / "fitted"
    ddpo(
        "fit-aesthetic",
        *map(str, (paths[0].parent, folder / "ratings.csv")),
        "--clip",
        str(clip),
        "--output",
        str(fitted),
    )
    lap("fitting")
    reward = ("--reward.clip", str(clip), "--reward.head", str(fitted / "head.safetensors"))
    placed = (
        "--output_dir",
        str(folder),
        "--name",
        "ddpo",
        "--seed",
        str(options.seed),
        "--evaluation.scorers",
        SCORERS,
    )
    ddpo("train", RECIPE, "--serial", *reward, *placed, *overrides)
    lap("training")
    ddpo("report", str(folder / "ddpo"))
    lap("report")
    summary = json.loads((folder / "ddpo" / "report" / "summary.json").read_text())
    print("\n" + table(summary, json.loads((fitted / "metrics.json").read_text()), seconds))
    if options.image:
        small_copy(folder / "ddpo" / "report" / "before_after.png", options.image, IMAGE_WIDTH)


if __name__ == "__main__":
    main()
