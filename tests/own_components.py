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
from ray_ddpo.learner.algorithms.rwr import RewardWeightedRegression


class FloatImages(Shapes):
    """A policy that decodes to floats."""

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        policy: Any = super().load(device, sampling, role)
        policy.decode = lambda latents: latents
        return policy


class ForgetsWeights(Shapes):
    """A policy that does not load weights."""

    def load(self, device: str, sampling: SamplingTable, role: Role) -> Policy:
        policy: Any = super().load(device, sampling, role)
        policy.restore = lambda path: None
        return policy


class Cats(PromptSource):
    """A prompt source that returns cats."""

    def listed(self) -> None:
        return None

    def load(self) -> SamplePrompt:
        return lambda generator: Prompt(f"cat number {generator.integers(9)}")


class OnlyTexts(Cats):
    """A prompt source that returns no `Prompt`."""

    def load(self) -> Any:
        return lambda generator: "a cat"


class LosesGradients(DDPOImportanceSampling):
    """An algorithm whose loss has no gradient."""

    def compute_loss(self, policy: Any, batch: Any) -> TransitionLoss:
        return TransitionLoss(torch.zeros(len(batch.latents)))


class OneForAll(DDPOImportanceSampling):
    """A reward that returns one number for all images."""

    def compute_advantages(self, statistics: Any, prompts: list[str], rewards: Any, images_per_prompt: int) -> Any:
        return statistics, np.mean(rewards)


class Misspelt(DDPOImportanceSampling):
    """An algorithm that asks for a column that no batch has."""

    @property
    def columns(self) -> Any:
        return {"reference_mean"}


class OfTransitions(RewardWeightedRegression):
    """An algorithm on noised samples that asks for a column of transitions."""

    @property
    def columns(self) -> Any:
        return {"behavior_means"}


class Quiet(Tracker):
    """A tracker whose `start` returns no live tracker."""

    def start(self, run: RunInfo) -> Any:
        return None


class Unreachable(Quiet):
    """A tracker without its service."""

    def start(self, run: RunInfo) -> LiveTracker:
        raise ConnectionError("no route to\nthe service")


class Column(Reward):
    """A reward that returns a column."""

    def load(self, device: str) -> LoadedReward:
        return lambda images, prompts, metadata: np.zeros((len(images), 1))


class NeedsLargeImages(Reward):
    """A reward that raises at images smaller than its own."""

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            return images[:, 500, 500].mean(1)

        return score
