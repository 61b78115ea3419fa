"""The interface of an algorithm: advantages from rewards, and a loss on transitions or noised samples."""

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
    """The loss and its diagnostics, one value per transition. Only `loss` and `terms` have gradients.

    A field is None if the algorithm does not compute it.
    """

    loss: Float[Tensor, "B"]
    log_ratio: Float[Tensor, "B"] | None = None  # log_prob − old_log_prob
    clipped: Float[Tensor, "B"] | None = None  # 1 if the loss's ratio is outside the clip range
    # 0 if a transition is masked: its loss is 0, and the mean over the optimizer step leaves it out
    mask: Float[Tensor, "B"] | None = None
    importance_weight: Float[Tensor, "B"] | None = None
    kl_reference: Float[Tensor, "B"] | None = None  # KL of the step to the pretrained model, in nats
    # the parts of the loss by name, if there are several
    terms: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)


class Algorithm(Component, ABC):
    """An algorithm: its hyperparameters, its advantages and its loss."""

    def check(self, recipe: Recipe) -> None:
        """Check the rest of the recipe.

        Raises:
            ValueError: this algorithm does not support a setting of the recipe.
        """

    def check_policy(self, policy: PolicyConfig) -> None:
        """Check the numerics of sampler and learner.

        Raises:
            ValueError: this algorithm does not support them.
        """

    def check_micro_batches(self, recipe: Recipe, stochastic_steps: int) -> None:
        """Check that `learner.micro_batch_size` divides a rank's transitions of an optimizer step.

        Args:
            stochastic_steps: stochastic steps of the schedule.

        Raises:
            ValueError: it does not.
        """
        images, each = recipe.learner.images_per_rank, self.transitions_per_image(recipe, stochastic_steps)
        size, ranks = recipe.learner.micro_batch_size, recipe.learner.world_size
        if size != "auto" and images * each % size:
            what = "noised samples" if self.noised_samples_per_image else "trained steps"
            raise ValueError(
                f"an optimizer step has {images} images × {each} {what} = {images * each} transitions"
                f"{f' on each of {ranks} ranks' if ranks > 1 else ''}, "
                f'which learner.micro_batch_size = {size} does not divide: give a divisor, or "auto"'
            )

    def transitions_per_image(self, recipe: Recipe, stochastic_steps: int) -> int:
        """Return the number of transitions, or noised samples, of an image in an inner epoch.

        Args:
            stochastic_steps: stochastic steps of the schedule.
        """
        return self.noised_samples_per_image or recipe.sampling.trained_steps(stochastic_steps)

    @property
    def noised_samples_per_image(self) -> int | None:
        """The number of noised samples per finished image; None if the algorithm trains on the sampled transitions."""
        return None

    @property
    def needs_proximal_log_probs(self) -> bool:
        """True if `compute_loss` reads `proximal_log_probs`. Costs a forward pass for all but the first step."""
        return False

    @property
    def needs_behavior_means(self) -> bool:
        """True if `compute_loss` reads `behavior_means`. Costs a forward pass of the behavior policy."""
        return False

    @property
    def needs_reference_means(self) -> bool:
        """True if `compute_loss` reads `reference_means`. Costs a forward pass of the pretrained model."""
        return False

    @property
    def needs_old_predictions(self) -> bool:
        """True if `compute_loss` reads `old_predictions`. Costs a forward pass of the behavior policy."""
        return False

    @property
    def needs_reference_predictions(self) -> bool:
        """True if `compute_loss` reads `reference_predictions`. Costs a forward pass of the pretrained model."""
        return False

    @property
    def trained_fraction(self) -> float:
        """The approximate fraction of a round's images that enter optimizer steps, for `ddpo plan`."""
        return 1.0

    def average_decay(self, policy_version: int) -> float | None:
        """Return the decay of the moving average of weights that samplers use.

        Samplers use decay · previous version + (1 − decay) · trained weights. None: they use the trained weights.
        """
        return None

    def trained_images(self, advantages: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Return the mask of images that enter optimizer steps.

        Args:
            advantages: the output of `compute_advantages`.
        """
        return np.ones(len(advantages), bool)

    @property
    def advantage_settings(self) -> AdvantageSettings | None:
        """The settings of advantages; None if the algorithm weights images by reward and has no advantages."""
        return None

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Convert advantages to the algorithm's learning signal."""
        return advantages

    @abstractmethod
    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """Compute each image's learning signal from its reward.

        Args:
            statistics: the last rewards of each prompt, before these images.
            prompts: one per image. The images of a group are neighbors.
            rewards: float [N], one per image.
            images_per_prompt: images of a group.

        Returns:
            The statistics with these images added, and float [N]: an advantage or a weight per image.
        """

    @abstractmethod
    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        """Compute the loss of each transition under the policy's current weights, with gradients.

        Args:
            batch: a `TransitionBatch`, or a `NoisedBatch` if `noised_samples_per_image` is not None.
        """
