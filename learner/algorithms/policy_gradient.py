"""The base of policy gradients on sampled transitions: advantages, step weights, clipping, KL."""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.trajectory import Column, NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.losses import gaussian_kl, sum_of
from ray_ddpo.learner.algorithms.off_policy import decoupled_surrogate, drift_nats, importance_weight, within_drift

CLIP_RANGE = 1e-4  # the lineage's, on the mean scale


class OffPolicySettings(Component):
    """Off-policy corrections for lag (`learner/algorithms/off_policy.py`); by default none but the ratio."""

    ratio: Literal["behavior", "proximal"] = "behavior"
    """Denominator of the ratio: the policy that sampled (`behavior`), or the one before this update (`proximal`)."""
    importance_weight: float | None = Field(default=None, gt=0)
    """Bound of |log(π_prox / π_behavior)|, by which transitions are weighted, on the scale of log-probs.

    By default all weights are 1.
    """
    max_drift_nats: float | None = Field(default=None, gt=0)
    """KL in nats to the sampling policy above which a transition is masked. By default none is."""

    @model_validator(mode="after")
    def _weight_belongs_to_the_proximal_ratio(self) -> "OffPolicySettings":
        if self.importance_weight is not None and self.ratio != "proximal":
            raise ValueError(
                f"importance_weight is {self.importance_weight} and ratio {self.ratio!r}, which has that weight in it "
                'already: give ratio = "proximal", or no importance_weight'
            )
        return self


class PolicyGradient(Algorithm, ABC):
    """Policy gradient on the log-probs of the sampled steps, with clipped advantages."""

    advantages: AdvantageSettings = AdvantageSettings()
    """Computation of advantages from rewards."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Absolute value at which advantages are clipped."""
    step_weights: tuple[float, ...] = ()
    """Weights of the loss, one per denoising step. By default all 1."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        self.advantages.check(recipe)
        count, steps = len(self.step_weights), recipe.sampling.num_steps
        if self.step_weights and (count != steps or min(self.step_weights) < 0 or not any(self.step_weights)):
            raise ValueError(
                f"algorithm.step_weights has {count} numbers from {min(self.step_weights)} to "
                f"{max(self.step_weights)}: it must have sampling.num_steps = {steps} of them, none below 0 and not "
                "all of them 0"
            )

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return self.advantages.advantages(statistics, prompts, rewards, images_per_prompt)

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        assert isinstance(batch, TransitionBatch), "this algorithm trains on sampled transitions"
        transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
        limited = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        if self.step_weights:
            limited = limited * torch.tensor(self.step_weights, device=limited.device)[batch.steps]
        return self.transition_loss(transition, batch, limited)

    @abstractmethod
    def transition_loss(
        self, transition: Transition, batch: TransitionBatch, advantages: Float[Tensor, "B"]
    ) -> TransitionLoss:
        """Compute the loss of each transition.

        Args:
            transition: the step's distribution under the current weights.
            advantages: clipped, and multiplied by `step_weights`.
        """


class ClippedPolicyGradient(PolicyGradient, ABC):
    """PPO's clipped surrogate on every denoising step, with optional off-policy corrections and KL penalty.

    `clip_range` and `kl_coef` are on the scale of log-probs, the mean over latent elements. `clip_nats` and
    `kl_coef_nats` are on the scale of a whole step, so that one number fits every resolution.
    """

    clip_range: float | None = Field(default=None, gt=0)
    """Clip range of the ratio, as a mean over latent elements. By default 1e-4, unless `clip_nats` is given."""
    clip_nats: float | None = Field(default=None, gt=0)
    """Clip range in nats per denoising step. Give this or `clip_range`."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to the pretrained model, as a mean over latent elements."""
    kl_coef_nats: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to the pretrained model, in nats per denoising step. Give this or `kl_coef`."""
    off_policy: OffPolicySettings = OffPolicySettings()
    """Off-policy corrections for transitions that an older policy sampled."""

    @model_validator(mode="after")
    def _one_scale_each(self) -> "ClippedPolicyGradient":
        if self.clip_range is not None and self.clip_nats is not None:
            raise ValueError(f"clip_range is {self.clip_range} and clip_nats {self.clip_nats}: give one of the two")
        if self.kl_coef and self.kl_coef_nats:
            raise ValueError(f"kl_coef is {self.kl_coef} and kl_coef_nats {self.kl_coef_nats}: give one of the two")
        return self

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        super().check(recipe, policy)
        if policy.numerics_differ and self.off_policy.ratio == "behavior":
            raise ValueError(
                f"policy.dtype is {policy.dtype!r}, sampler_dtype {policy.sampler_dtype!r}, compile {policy.compile!r} "
                f"and merge_adapters {policy.merge_adapters}: sampler and learner then round differently, by far more "
                "than the clip range, so the ratio must be to the learner's own log-probs: give "
                "algorithm.off_policy.ratio = "
                '"proximal"'
            )

    def clip(self, latent_elements: int) -> float:
        """Return the clip range on the scale of `log_prob`, for latents with this many elements."""
        return self.clip_nats / latent_elements if self.clip_nats is not None else self.clip_range or CLIP_RANGE

    @property
    def columns(self) -> set[Column]:
        wanted: dict[Column, bool] = {
            "proximal_log_probs": self.off_policy.ratio == "proximal",
            "behavior_means": self.off_policy.max_drift_nats is not None,
            "reference_means": self.kl_coef > 0 or self.kl_coef_nats > 0,
        }
        return {name for name, is_wanted in wanted.items() if is_wanted}

    def transition_loss(
        self, transition: Transition, batch: TransitionBatch, advantages: Float[Tensor, "B"]
    ) -> TransitionLoss:
        clip_range = self.clip(batch.latents[0].numel())
        log_prob = transition.log_prob(batch.next_latents)
        log_ratio = (log_prob - batch.old_log_probs).detach()
        denominator = self._ratios_denominator(log_prob, batch)
        mask = self._drift_mask(transition, batch)
        if mask is not None:  # a masked transition has ratio 1 and no gradient
            log_prob = torch.where(mask > 0, log_prob, denominator)
        band = self.off_policy.importance_weight
        weight = None if band is None else importance_weight(denominator, batch.old_log_probs, band)
        ones = torch.ones_like(denominator)
        loss = decoupled_surrogate(log_prob, denominator, ones if weight is None else weight, advantages, clip_range)
        clipped = (((log_prob - denominator).detach().exp() - 1).abs() > clip_range).float()
        terms = {"policy": loss}
        kl = None
        if batch.reference_means is not None:
            kl = gaussian_kl(transition, Transition(batch.reference_means, transition.std))
            terms["kl"] = (self.kl_coef_nats or self.kl_coef / batch.latents[0].numel()) * kl
            kl = kl.detach()
        if mask is not None:  # in every term, so that the KL masks too
            terms = {name: torch.where(mask > 0, term, 0.0) for name, term in terms.items()}
        return TransitionLoss(sum_of(terms), log_ratio, clipped, mask, weight, kl, terms)

    def _ratios_denominator(self, log_prob: Float[Tensor, "B"], batch: TransitionBatch) -> Float[Tensor, "B"]:
        if self.off_policy.ratio == "behavior":
            return batch.old_log_probs
        return log_prob.detach() if batch.proximal_log_probs is None else batch.proximal_log_probs

    def _drift_mask(self, transition: Transition, batch: TransitionBatch) -> Float[Tensor, "B"] | None:
        limit = self.off_policy.max_drift_nats
        if limit is None:
            return None
        means = transition.mean.detach() if batch.behavior_means is None else batch.behavior_means
        return within_drift(drift_nats(transition, Transition(means, transition.std)), limit)
