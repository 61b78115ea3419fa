"""Measure images per second of the aesthetic reward: CLIP ViT-L/14's shape with random weights, images of 512 pixels.

Usage: python -m benchmarks.gpu_rewards ANSWERS.jsonl [--device cuda] [--tiny].
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.rewards import save_vit_l_14
from benchmarks.timing import median_seconds
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.recipe.registry import build
from tests.tiny_clip import save_tiny_head

REPEATS = 5


def main() -> None:
    """Write one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip, head = save_vit_l_14(Path(folder) / "clip"), save_tiny_head(Path(folder) / "head.safetensors", 768)
        table = {"name": "aesthetic", "clip": str(clip), "head": str(head)}
        score = build(REWARDS, table, "reward").load(given.device)
    for batch in (1,) if given.tiny else (16, 64):
        images = np.random.default_rng(0).integers(0, 256, (batch, 512, 512, 3), dtype=np.uint8)
        prompts, metadata = ["cat"] * batch, [{} for _ in range(batch)]
        taken = median_seconds(lambda: score(images, prompts, metadata), REPEATS)  # noqa: B023
        with given.answers.open("a") as file:
            file.write(json.dumps({"reward": "aesthetic", "batch": batch, "seconds": taken}) + "\n")
        print(f"aesthetic: {batch / taken:.0f} images/s in batches of {batch}", flush=True)


if __name__ == "__main__":
    main()
