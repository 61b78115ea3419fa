"""make rewards-bench: images per second of each reward without a download. CLIP has random weights."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.timing import machine, seconds
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.reward import LoadedReward
from ray_ddpo.common.recipe.registry import build
from tests.tiny_clip import save_tiny_head, save_tiny_tokenizer, vocabulary

ANIMALS = ["cat", "dog", "horse", "ant"]
LIGHT = (
    "brightness",
    "colourfulness",
    "sharpness",
    "entropy",
    "dark_share",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "animal_classifier",
)
CLIPS = ("aesthetic", "clip_score")
SIDES, BATCH = (64, 512), 16
CLIP_SIDE, CLIP_BATCH = 512, 4
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One reward on one batch."""

    name: str
    side: int  # of the square images, in pixels
    batch: int
    score: LoadedReward

    @cached_property
    def images(self) -> np.ndarray:
        shape = (self.batch, self.side, self.side, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def run(self) -> None:
        prompts = [ANIMALS[place % len(ANIMALS)] for place in range(self.batch)]
        self.score(self.images, prompts, [{} for _ in prompts])


def save_vit_l_14(folder: Path) -> Path:
    """Save a CLIP of ViT-L/14's shape with random weights. Its small vocabulary does not change the time."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    words = len(vocabulary())
    ends = {"vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    config = CLIPConfig(
        vision_config={**vision, "patch_size": 14, "projection_dim": 768},
        text_config={**text, **ends, "projection_dim": 768},
        projection_dim=768,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return save_tiny_tokenizer(folder)


def cases(names: list[str], folder: Path) -> Iterator[Case]:
    """Yield each reward, loaded once, on each of its batches."""
    keys: dict[str, dict[str, str]] = {}
    if set(names) & set(CLIPS):
        clip = str(save_vit_l_14(folder / "clip"))
        head = str(save_tiny_head(folder / "head.safetensors", dimension=768))
        keys = {"aesthetic": {"clip": clip, "head": head}, "clip_score": {"clip": clip}}
    for name in names:
        score = build(REWARDS, {"name": name, **keys.get(name, {})}, "reward").load("cpu")
        batches = [(CLIP_SIDE, CLIP_BATCH)] if name in CLIPS else [(side, BATCH) for side in SIDES]
        yield from (Case(name, side, batch, score) for side, batch in batches)


def interleaved(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the median seconds of each case. The cases take turns, after one warm-up turn."""
    turns = [[seconds(run) for run in runs] for _ in range(repeats + 1)]
    return [median(times) for times in zip(*turns[1:], strict=True)]


def table(measured: list[tuple[Case, float]]) -> Iterator[str]:
    """Return a table with one line per reward: images per second at each size."""
    sides = sorted({case.side for case, _ in measured})
    yield f"| reward | {' | '.join(f'{side}×{side}' for side in sides)} |"
    yield f"|---|{'---|' * len(sides)}"
    for name in dict.fromkeys(case.name for case, _ in measured):
        rates = {case.side: case.batch / time for case, time in measured if case.name == name}
        cells = (_rate(rates[side]) if side in rates else "–" for side in sides)
        yield f"| `{name}` | {' | '.join(cells)} |"


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.2g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=LIGHT + CLIPS, default=list(LIGHT + CLIPS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "pillow", "numpy"))
    print(f"{machine()}, {versions}; medians of {options.repeats} interleaved runs; {options.threads} threads, float32")
    print(f"images a second, in batches of {BATCH}, of {CLIP_BATCH} where CLIP's ViT-L/14 runs\n")
    with tempfile.TemporaryDirectory() as folder:
        found = list(cases(options.only, Path(folder)))
    times = interleaved([case.run for case in found], options.repeats)
    print("\n".join(table(list(zip(found, times, strict=True)))))


if __name__ == "__main__":
    main()
