"""Components as a user would write them beside a recipe, some of them with a mistake."""

from typing import Any

import numpy as np
import torch
from shapes import Shapes

from ray_ddpo.actors.rewards.reward import LoadedReward, Reward
from ray_ddpo.common.diffusion.policy import Policy, Role
from ray_ddpo.common.prompts import Prompt, PromptSource, SamplePrompt
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trackers.tracker import LiveTracker, RunInfo, Tracker
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling


class FloatImages(Shapes):
    """Decodes to floats."""

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        policy: Any = super().load(device, sampling, role)
        policy.decode = lambda latents: latents
        return policy


class ForgetsWeights(Shapes):
    """Reads no weights back."""

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        policy: Any = super().load(device, sampling, role)
        policy.restore = lambda path: None
        return policy


class Cats(PromptSource):
    """Draws cats."""

    def listed(self) -> None:
        return None

    def load(self) -> SamplePrompt:
        return lambda generator: Prompt(f"cat number {generator.integers(9)}")


class OnlyTexts(Cats):
    """Draws no `Prompt`."""

    def load(self) -> Any:
        return lambda generator: "a cat"


class LosesGradients(DDPOImportanceSampling):
    """Its loss leads nowhere."""

    def compute_loss(self, policy: Any, batch: Any) -> TransitionLoss:
        return TransitionLoss(torch.zeros(len(batch.latents)))


class OneForAll(DDPOImportanceSampling):
    """Gives all images one number."""

    def compute_advantages(self, statistics: Any, prompts: list[str], rewards: Any, images_per_prompt: int) -> Any:
        return statistics, np.mean(rewards)


class Quiet(Tracker):
    """Returns no tracker that is live."""

    def check(self) -> None:
        pass

    def start(self, run: RunInfo) -> Any:
        return None


class Unreachable(Quiet):
    """Has no service."""

    def start(self, run: RunInfo) -> LiveTracker:
        raise ConnectionError("no route to\nthe service")


class Column(Reward):
    """Returns a column."""

    def load(self, device: str) -> LoadedReward:
        return lambda images, prompts, metadata: np.zeros((len(images), 1))


class NeedsLargeImages(Reward):
    """Raises at images that are smaller than its own."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            return images[:, 500, 500].mean(1)

        return score
