"""The interface of an algorithm: advantages from rewards, and a loss on transitions, noised samples or restarts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import final

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from ray_ddpo.common.base_parts import Base, entry_base
from ray_ddpo.common.differentiable_reward import HasGradient
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.trajectory import COLUMNS, Column, NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.value_settings import ValueSettings

REWARD_TERM = "reward"  # the part of a loss that is a differentiable reward


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
    dual_clipped: Float[Tensor, "B"] | None = None  # 1 if the dual clip holds the loss of a negative advantage
    distrusted: Float[Tensor, "B"] | None = None  # 1 if the trust region holds the loss: it is 0, and in the mean
    # 1 if the policy, compared with the reference, ranks the row's group as its rewards do
    agrees: Float[Tensor, "B"] | None = None
    reward: Float[Tensor, "B"] | None = None  # of the images that the loss was computed on
    # mean squared difference of predictions from the pretrained model's, per latent element
    prediction_shift: Float[Tensor, "B"] | None = None
    kl_moving_reference: Float[Tensor, "B"] | None = None  # KL of the step to a reference that moves, in nats

    def first(self, rows: int) -> "TransitionLoss":
        """Return the first `rows` transitions alone. The gradient of the others is then 0."""
        if rows >= len(self.loss):
            return self
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "terms"}
        cut = {name: None if values is None else values[:rows] for name, values in columns.items()}
        return replace(self, **cut, terms={name: values[:rows] for name, values in self.terms.items()})


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
    def guides_denoising(self) -> bool:
        """Return whether predictions for noised samples are guided as in sampling."""
        return True

    @property
    def compares_groups(self) -> bool:
        """Return whether the loss compares images of a group, which then share noise."""
        return False

    @property
    def shares_noise(self) -> bool:
        """Return whether the images of a group have the same noise and timesteps, and are next to each other."""
        return self.compares_groups

    @property
    def restarts_per_image(self) -> int | None:
        """The number of restarts per image, if the algorithm trains on the reward's gradient through the last steps."""
        return None

    def with_rewards(
        self, recipe: Recipe, rewards: Mapping[str, HasGradient], prompts: Sequence[Prompt]
    ) -> "Algorithm":
        """Return the algorithm with the rewards whose gradient its loss needs. By default it needs none.

        Args:
            recipe: the recipe.
            rewards: the rewards that are trained on, by name.
            prompts: some of the run, for synthetic batches.
        """
        return self

    def learner_sizes(self, sizes: PolicySizes) -> PolicySizes:
        """Return a policy's sizes with the memory of what the loss needs beside the network. By default it is none."""
        return sizes

    def passes_per_transition(self, recipe: Recipe) -> float:
        """Return the mean number of the network's passes with gradients per transition: 1 by default."""
        return 1.0

    def load(self, policy: Policy, config: PolicyConfig) -> Base:
        """Load what the loss needs on the learner's device beside the network. By default nothing.

        Returns:
            The fingerprints of the loaded files.
        """
        return entry_base(self, "algorithm")

    @property
    def trained_fraction(self) -> float:
        """The approximate fraction of a round's images that enter optimizer steps.

        If it is below 1, images with learning signal 0 enter none.
        """
        return 1.0

    def images_learned_from(self, recipe: Recipe) -> float:
        """Return how many images of a round enter optimizer steps, as far as that is known beforehand."""
        return recipe.images_per_round * self.trained_fraction

    @property
    def skips_zero_signals(self) -> bool:
        """Return whether images with learning signal 0 enter no optimizer step."""
        return self.trained_fraction < 1 or self.refill_attempts > 0

    @property
    def refill_attempts(self) -> int:
        """Return how often a round is refilled with further groups, in place of those whose rewards are all equal."""
        return 0

    def ema_decay(self, policy_version: int) -> float | None:
        """Return the decay of the moving average of weights that samplers use.

        Samplers use decay · previous version + (1 − decay) · trained weights. None: they use the trained weights.
        """
        return None

    def gradient_may_be_zero(self, advantages: Float[np.ndarray, "N"]) -> bool:
        """Return whether an optimizer step's gradient may be exactly 0: by default, if all advantages are equal.

        Args:
            advantages: the learning signal of the step's images.
        """
        return len(np.unique(advantages)) == 1

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Convert the output of `compute_advantages` to the learning signal that a batch has."""
        return advantages

    def select(self, signal: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
        """Return the learning signal, with 0 for images that are not to enter optimizer steps. By default all enter."""
        return signal

    @property
    def value_settings(self) -> ValueSettings | None:
        """The settings of a value function that the learner learns, and subtracts from advantages. By default none."""
        return None

    def gate_kl(
        self,
        history: PromptStatistics,
        trained: Float[np.ndarray, "N"],
        auxiliary: Mapping[str, Float[np.ndarray, "N"]],
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"] | None]:
        """Return which images have the KL to the reference, as factors; None, as by default: all have it.

        Args:
            history: what earlier rounds returned, before this one.
            trained: the weighted sum of the rewards.
            auxiliary: the rewards of weight 0, by name.

        Returns:
            The history with this round added, and 1 or 0 per image.
        """
        return history, None

    def shape_advantages(
        self, advantages: Float[np.ndarray, "N"], thumbnails: UInt8[np.ndarray, "N D"], images_per_prompt: int
    ) -> Float[np.ndarray, "N"]:
        """Change the learning signal by how much the images of a group differ. By default it stays."""
        return advantages

    def resets_reference(self, kl: float, rounds: int) -> bool:
        """Return whether the policy becomes the reference after a round. By default the pretrained model stays it.

        Args:
            kl: the round's mean KL to the reference, as a mean over latent elements.
            rounds: rounds since the reference's version.
        """
        return False

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
    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch | RestartBatch) -> TransitionLoss:
        """Compute the loss of each transition under the policy's current weights, with gradients.

        Args:
            batch: a `TransitionBatch`, a `NoisedBatch` if `noised_samples_per_image` is not None, or a `RestartBatch` if
                `restarts_per_image` is not None.
        """

    def remark(self, round_index: int, metrics: Mapping[str, float]) -> str | None:
        """Return what to tell the user about a round's update. By default nothing."""
        return None

    @final
    def check_columns(self, recipe: Recipe) -> None:
        """Check that the learner can compute the columns that the algorithm asks for.

        Raises:
            ValueError: the algorithm's batches have no such column, or the recipe keeps no pretrained model.
        """
        name, columns = type(self).__name__, self.columns
        batch_type = TransitionBatch if self.noised_samples_per_image is None else NoisedBatch
        known = [each.name for each in fields(batch_type) if each.name in COLUMNS]
        if unknown := sorted(set(columns) - set(known)):
            raise ValueError(f"{name}.columns has {unknown}: the columns of a {batch_type.__name__} are {known}")
        reference = sorted(column for column in columns if column.startswith("reference_"))
        if reference and recipe.policy.table().get("train") == "full":
            raise ValueError(
                f"policy.train is 'full' and {name} needs {reference[0]}: they are of the pretrained model, which is the "
                'network with its adapters switched off; give policy.train = "lora", or settings of the algorithm that '
                'compare with no pretrained model (kl_coef = 0; of dpo, reference = "behavior")'
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
            what = "restarts" if self.restarts_per_image else what
            raise ValueError(
                f"an optimizer step has {images} images × {each} {what} = {images * each} transitions"
                f"{f' on each of {ranks} ranks' if ranks > 1 else ''}, "
                f'which learner.micro_batch_size = {size} does not divide: give a divisor, or "auto"'
            )

    @final
    def steps_per_round(self, recipe: Recipe) -> int:
        """Return how many optimizer steps a round has, if no KL budget ends it early and no image is dropped."""
        learner = recipe.learner
        images = round(self.images_learned_from(recipe) / learner.parts_per_round)
        # A remainder joins the last full step, and fewer images than a step's make one step.
        return max(1, images // learner.images_per_step) * learner.inner_epochs * learner.parts_per_round

    @final
    def transitions_per_image(self, recipe: Recipe, stochastic_steps: int) -> int:
        """Return the number of transitions, or noised samples, of an image in an inner epoch.

        Args:
            stochastic_steps: stochastic steps of the schedule.
        """
        return (
            self.restarts_per_image or self.noised_samples_per_image or recipe.sampling.trained_steps(stochastic_steps)
        )
