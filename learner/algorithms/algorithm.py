"""What every algorithm promises: what each image is worth, from rewards, and a loss on (image, step) pairs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics


@dataclass(frozen=True)
class TransitionLoss:
    """An algorithm's loss and what it looked at, one value a pair; all but loss and terms without gradient. None: not its way."""

    loss: Float[Tensor, "B"]
    log_ratio: Float[Tensor, "B"] | None = None  # log_prob − old_log_prob
    clipped: Float[Tensor, "B"] | None = None  # 1 where the loss's ratio is outside its range
    kept: Float[Tensor, "B"] | None = None  # 0 where a pair is masked: its loss is 0 and the denominator leaves it out
    importance_weight: Float[Tensor, "B"] | None = None
    kl_reference: Float[Tensor, "B"] | None = None  # nats, of the pair's step, to the pretrained model
    terms: Mapping[str, Float[Tensor, "B"]] = field(
        default_factory=dict
    )  # the parts of the loss by name, if it has any


class Algorithm(Component, ABC):
    """An algorithm's hyperparameters, and its mathematics."""

    def check(self, recipe: Recipe) -> None:
        """ValueError: the rest of the recipe does not go with this algorithm."""

    def check_policy(self, policy: PolicyConfig) -> None:
        """ValueError: the algorithm does not go with how sampler and learner compute."""

    def check_micro_batches(self, recipe: Recipe, stochastic_steps: int) -> None:
        """ValueError: `learner.micro_batch_size` does not divide a rank's pairs of an optimizer step, of so many noisy steps."""
        images, each = recipe.learner.images_per_rank, self.transitions_per_image(recipe, stochastic_steps)
        size, ranks = recipe.learner.micro_batch_size, recipe.learner.world_size
        if size != "auto" and images * each % size:
            what = "noised_samples" if self.noised_samples_per_image else "steps with noise"
            raise ValueError(
                f"an optimizer step has {images} images × {each} {what} = {images * each} pairs to learn from"
                f"{f' on each of {ranks} ranks' if ranks > 1 else ''}, "
                f"which learner.micro_batch_size = {size} does not divide"
            )

    def transitions_per_image(self, recipe: Recipe, stochastic_steps: int) -> int:
        """How many pairs an image gives an optimizer step, of a schedule with so many steps with noise."""
        return self.noised_samples_per_image or recipe.sampling.trained_steps(stochastic_steps)

    @property
    def noised_samples_per_image(self) -> int | None:
        """How often a finished image is noised again to be learned from; None: the steps of its path are learned from."""
        return None

    @property
    def needs_proximal_log_probs(self) -> bool:
        """Whether `compute_loss` reads `proximal_log_probs`, which cost a forward pass after a round's first optimizer step."""
        return False

    @property
    def needs_behavior_means(self) -> bool:
        """Whether `compute_loss` reads `behavior_means`, which cost a forward pass under the weights that sampled."""
        return False

    @property
    def needs_reference_means(self) -> bool:
        """Whether `compute_loss` reads `reference_means`, which cost a forward pass of the pretrained model."""
        return False

    @property
    def needs_old_predictions(self) -> bool:
        """Whether `compute_loss` reads `old_predictions`, which cost a forward pass under the weights that sampled."""
        return False

    @property
    def needs_reference_predictions(self) -> bool:
        """Whether `compute_loss` reads `reference_predictions`, which cost a forward pass of the pretrained model."""
        return False

    @property
    def trained_fraction(self) -> float:
        """About how many of a round's images enter optimizer steps; for plans."""
        return 1.0

    def average_decay(self, policy_version: int) -> float | None:
        """Samplers sample with decay · the version before + (1 − decay) · the trained weights; None: with the trained weights."""
        return None

    def trained_images(self, advantages: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Which images enter optimizer steps at all."""
        return np.ones(len(worth), bool)

    @property
    def advantage_settings(self) -> AdvantageSettings | None:
        """How its advantages come from rewards; None: it makes weights of rewards, which rewards apart do not have."""
        return None

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """What images with these advantages are worth."""
        return advantages

    @abstractmethod
    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """The statistics with these images in them, and what each image is worth: an advantage, or a weight."""

    @abstractmethod
    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        """The loss of each pair under the policy's present weights, with gradients."""
