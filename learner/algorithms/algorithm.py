"""The interface of an algorithm: advantages from rewards, and a loss on transitions or noised samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import final

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.trajectory import Column, NoisedBatch, TransitionBatch
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

    @property
    def columns(self) -> set[Column]:
        """The precomputed columns that `compute_loss` reads. Each costs a forward pass under other weights.

        A column of a batch is None if the batch's own forward pass is under those weights.
        """
        return set()

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        """Check the rest of the recipe, and the numerics of sampler and learner.

        Raises:
            ValueError: this algorithm does not support a setting.
        """

    @property
    def noised_samples_per_image(self) -> int | None:
        """The number of noised samples per finished image; None if the algorithm trains on the sampled transitions."""
        return None

    @property
    def trained_fraction(self) -> float:
        """The approximate fraction of a round's images that enter optimizer steps.

        If it is below 1, images with learning signal 0 enter none.
        """
        return 1.0

    def ema_decay(self, policy_version: int) -> float | None:
        """Return the decay of the moving average of weights that samplers use.

        Samplers use decay · previous version + (1 − decay) · trained weights. None: they use the trained weights.
        """
        return None

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Convert the output of `compute_advantages` to the learning signal that a batch has."""
        return advantages

    @abstractmethod
    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """Compute each image's advantage, or weight, from its reward.

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

    @final
    def check_columns(self, recipe: Recipe) -> None:
        """Check that the learner can compute the columns that the algorithm asks for.

        Raises:
            ValueError: the algorithm's batches have no such column, or the recipe keeps no pretrained model.
        """
        name, columns = type(self).__name__, self.columns
        batch_type = TransitionBatch if self.noised_samples_per_image is None else NoisedBatch
        known = [each.name for each in fields(batch_type) if each.default is None]
        if unknown := sorted(set(columns) - set(known)):
            raise ValueError(f"{name}.columns has {unknown}: the columns of a {batch_type.__name__} are {known}")
        reference = sorted(column for column in columns if column.startswith("reference_"))
        if reference and recipe.policy.table().get("train") == "full":
            raise ValueError(
                f"policy.train is 'full' and {name} needs {reference[0]}, as it does if kl_coef is above 0: the "
                "pretrained model is the network with its adapters switched off, so a KL to it needs "
                'policy.train = "lora"'
            )

    @final
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

    @final
    def transitions_per_image(self, recipe: Recipe, stochastic_steps: int) -> int:
        """Return the number of transitions, or noised samples, of an image in an inner epoch.

        Args:
            stochastic_steps: stochastic steps of the schedule.
        """
        return self.noised_samples_per_image or recipe.sampling.trained_steps(stochastic_steps)
