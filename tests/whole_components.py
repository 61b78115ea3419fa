"""Components as a user would write them beside a recipe, one of each kind and without a mistake."""

from pathlib import Path
from typing import Any

import numpy as np

from ray_ddpo import (
    ClippedPolicyGradient,
    LiveTracker,
    Prompt,
    PromptSource,
    Reward,
    RunInfo,
    Tracker,
)
from ray_ddpo.actors.rewards.reward import LoadedReward
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.prompts import SamplePrompt


class RLOO(ClippedPolicyGradient):
    """An advantage is the reward less the mean of the others of its prompt (Ahmadian et al. 2024)."""

    scale: float = 1.0

    def compute_advantages(
        self, statistics: Any, prompts: list[str], rewards: np.ndarray, images_per_prompt: int
    ) -> Any:
        groups = rewards.reshape(-1, images_per_prompt)
        others = (groups.sum(1, keepdims=True) - groups) / max(images_per_prompt - 1, 1)
        return statistics, (self.scale * (groups - others)).ravel()


class Redness(Reward):
    """How red an image is."""

    strength: float = 1.0

    def load(self, device: str) -> LoadedReward:
        return lambda images, prompts, metadata: self.strength * images[..., 0].mean(axis=(1, 2)) / 255


class Cats(PromptSource):
    """Cats by number."""

    count: int = 3

    def listed(self) -> list[str]:
        return [f"cat number {number}" for number in range(self.count)]

    def load(self) -> SamplePrompt:
        return lambda generator: Prompt(f"cat number {generator.integers(self.count)}")


class LiveRounds(LiveTracker):
    """A text file, a line a round."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, metrics: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(f"{metrics['round']:g}\n")

    def finish(self) -> None:
        pass


class Rounds(Tracker):
    """Writes each round's number."""

    file: str = "rounds.txt"

    def start(self, run: RunInfo) -> LiveRounds:
        return LiveRounds(Path(run.folder) / self.file)


class Family(StableDiffusion):
    """Stable Diffusion under another name."""


def redness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return images[..., 0].mean(axis=(1, 2)) / 255
