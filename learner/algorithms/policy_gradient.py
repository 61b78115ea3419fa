"""The bases of policy gradients on sampled transitions: advantages, step weights, ratios, clipping, KL."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.transition import Transition, column
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.trajectory import Column, NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.clip_bounds import ClipBounds, check_dual_clip
from ray_ddpo.learner.algorithms.losses import gaussian_kl, sum_of
from ray_ddpo.learner.algorithms.off_policy import decoupled_surrogate, drift_nats, importance_weight, within_drift
from ray_ddpo.learner.algorithms.selection import SelectionSettings, check_refill
from ray_ddpo.learner.algorithms.step_weights import StepWeights, check_step_weights, weights_of_steps

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
    selection: SelectionSettings = SelectionSettings()
    """Selection of the images that are trained on. By default all are."""
    step_weights: StepWeights = ()
    """Weights of the loss, one per denoising step, or `noise_level`: by each step's noise. By default all 1."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        self.advantages.check(recipe)
        self.selection.check(recipe)
        check_refill(self.selection.refill, recipe, "algorithm.selection.refill")
        if self.selection.refill and self.advantages.kind != "group":
            raise ValueError(
                f"algorithm.selection.refill is {self.selection.refill} and algorithm.advantages.kind "
                f"{self.advantages.kind!r}, with which a group of equal rewards has advantages other than 0: give 'group', "
                "or leave refill out"
            )
        check_step_weights(self.step_weights, recipe.sampling.num_steps)

    @property
    def trained_fraction(self) -> float:
        return self.selection.fraction

    def images_learned_from(self, recipe: Recipe) -> float:
        group = self.selection.group_size(recipe)
        rounds = 1 + recipe.learner.replay_rounds
        return float(rounds * (recipe.images_per_round // group) * self.selection.count(group))

    @property
    def skips_zero_signals(self) -> bool:
        return self.selection.leaves_out or super().skips_zero_signals

    @property
    def refill_attempts(self) -> int:
        return self.selection.refill

    def select(self, signal: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
        return self.selection.select(signal, images_per_prompt)

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return self.advantages.advantages(statistics, prompts, rewards, images_per_prompt)

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch | RestartBatch) -> TransitionLoss:
        assert isinstance(batch, TransitionBatch), "this algorithm trains on sampled transitions"
        transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
        limited = batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        weights = weights_of_steps(self.step_weights, policy, str(limited.device))
        if weights is not None:
            limited = limited * weights[batch.steps]
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


@dataclass(frozen=True, kw_only=True)
class RatioStep:
    """The input of a surrogate: a step under the current weights, and under those of the ratio's denominator.

    For a masked transition both are equal, so that its ratio is 1 and has no gradient.
    """

    transition: Transition
    log_prob: Float[Tensor, "B"]
    old_log_prob: Float[Tensor, "B"]  # the ratio's denominator
    old_means: Float[Tensor, "B C *S"]  # of the same policy; the current ones if the algorithm compares no means
    weight: Float[Tensor, "B"]  # importance weight
    advantages: Float[Tensor, "B"]

    @property
    def latent_elements(self) -> int:
        """The number of latent elements of an image."""
        return self.transition.mean[0].numel()


@dataclass(frozen=True)
class Surrogate:
    """The policy's part of a loss, and its diagnostics without gradient, which `TransitionLoss` describes."""

    loss: Float[Tensor, "B"]
    clipped: Float[Tensor, "B"] | None = None
    dual_clipped: Float[Tensor, "B"] | None = None
    distrusted: Float[Tensor, "B"] | None = None


class RatioPolicyGradient(PolicyGradient, ABC):
    """A surrogate of the ratio on every denoising step, with optional off-policy corrections and KL penalty.

    `kl_coef` is on the scale of log-probs, the mean over latent elements. `kl_coef_nats` is on the scale of a whole
    step, so that one number fits every resolution.
    """

    moves_reference: ClassVar[bool] = False  # whether the reference may be another policy than the pretrained model
    compares_means: ClassVar[bool] = False  # whether the surrogate reads the means of the ratio's denominator

    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to the pretrained model, as a mean over latent elements."""
    kl_coef_nats: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to the pretrained model, in nats per denoising step. Give this or `kl_coef`."""
    off_policy: OffPolicySettings = OffPolicySettings()
    """Off-policy corrections for transitions that an older policy sampled."""

    @model_validator(mode="after")
    def _one_kl_scale(self) -> "RatioPolicyGradient":
        if self.kl_coef and self.kl_coef_nats:
            raise ValueError(f"kl_coef is {self.kl_coef} and kl_coef_nats {self.kl_coef_nats}: give one of the two")
        return self

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        super().check(recipe, policy)
        if policy.numerics_differ and self.off_policy.ratio == "behavior":
            stored = f", sampler_storage {policy.sampler_storage!r}" if policy.sampler_storage else ""
            raise ValueError(
                f"policy.dtype is {policy.dtype!r}, sampler_dtype {policy.sampler_dtype!r}, compile {policy.compile!r}"
                f"{stored} and merge_adapters {policy.merge_adapters}: sampler and learner then round differently, by far more "
                "than the clip range, so the ratio must be to the learner's own log-probs: give "
                "algorithm.off_policy.ratio = "
                '"proximal"'
            )

    @property
    def columns(self) -> set[Column]:
        is_proximal, limits_drift = self.off_policy.ratio == "proximal", self.off_policy.max_drift_nats is not None
        wanted: dict[Column, bool] = {
            "proximal_log_probs": is_proximal and not self.compares_means,
            "proximal_means": is_proximal and self.compares_means,
            "behavior_means": limits_drift or (self.compares_means and not is_proximal),
            "reference_means": self.kl_coef > 0 or self.kl_coef_nats > 0,
        }
        return {name for name, is_wanted in wanted.items() if is_wanted}

    @abstractmethod
    def surrogate(self, step: RatioStep) -> Surrogate:
        """Compute the policy's part of each transition's loss, multiplied by the step's importance weight."""

    def transition_loss(
        self, transition: Transition, batch: TransitionBatch, advantages: Float[Tensor, "B"]
    ) -> TransitionLoss:
        log_prob = transition.log_prob(batch.next_latents)
        log_ratio = (log_prob - batch.old_log_probs).detach()
        denominator, old_means = self._ratios_denominator(log_prob, transition, batch)
        mask = self._drift_mask(transition, batch)
        if mask is not None:  # a masked transition has ratio 1 and no gradient
            log_prob = torch.where(mask > 0, log_prob, denominator)
            old_means = torch.where(column(mask, old_means) > 0, old_means, transition.mean.detach())
        band = self.off_policy.importance_weight
        weight = None if band is None else importance_weight(denominator, batch.old_log_probs, band)
        found = self.surrogate(
            RatioStep(
                transition=transition,
                log_prob=log_prob,
                old_log_prob=denominator,
                old_means=old_means,
                weight=torch.ones_like(denominator) if weight is None else weight,
                advantages=advantages,
            )
        )
        terms, kl = {"policy": found.loss}, None
        if batch.reference_means is not None:
            kl = gaussian_kl(transition, Transition(batch.reference_means, transition.std))
            weighted = kl if batch.kl_weights is None else batch.kl_weights * kl
            terms["kl"] = (self.kl_coef_nats or self.kl_coef / batch.latents[0].numel()) * weighted
            kl = kl.detach()
        if mask is not None:  # in every term, so that the KL masks too
            terms = {name: torch.where(mask > 0, term, 0.0) for name, term in terms.items()}
        shares = found.dual_clipped, found.distrusted
        result = TransitionLoss(sum_of(terms), log_ratio, found.clipped, mask, weight, kl, terms, *shares)
        return replace(result, kl_reference=None, kl_moving_reference=kl) if self.moves_reference else result

    def _ratios_denominator(
        self, log_prob: Float[Tensor, "B"], transition: Transition, batch: TransitionBatch
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B C *S"]]:
        """Return log-probs and means under the policy in the ratio's denominator."""
        own = transition.mean.detach()
        if self.off_policy.ratio == "behavior":
            means = batch.behavior_means if self.compares_means else None
            return batch.old_log_probs, own if means is None else means
        if batch.proximal_means is not None:
            before = Transition(batch.proximal_means, transition.std)
            return before.log_prob(batch.next_latents), before.mean
        return log_prob.detach() if batch.proximal_log_probs is None else batch.proximal_log_probs, own

    def _drift_mask(self, transition: Transition, batch: TransitionBatch) -> Float[Tensor, "B"] | None:
        limit = self.off_policy.max_drift_nats
        if limit is None:
            return None
        means = transition.mean.detach() if batch.behavior_means is None else batch.behavior_means
        return within_drift(drift_nats(transition, Transition(means, transition.std)), limit)


class ClippedPolicyGradient(RatioPolicyGradient, ABC):
    """PPO's clipped surrogate on every denoising step, with optional off-policy corrections and KL penalty.

    `clip_range` is on the scale of log-probs, the mean over latent elements. `clip_nats` is on the scale of a whole
    step, so that one number fits every resolution.
    """

    clip_range: float | None = Field(default=None, gt=0)
    """Clip range of the ratio, as a mean over latent elements. By default 1e-4, unless `clip_nats` is given."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Clip range above 1 on the same scale; `clip_range` is then the one below 1. By default both are equal."""
    clip_nats: float | None = Field(default=None, gt=0)
    """Clip range in nats per denoising step. Give this or `clip_range`."""
    clip_nats_high: float | None = Field(default=None, gt=0)
    """Clip range above 1 in nats; `clip_nats` is then the one below 1. By default both are equal."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Ratio above which the loss of a negative advantage no longer grows, on the scale of `clip_range`."""
    dual_clip_nats: float | None = Field(default=None, gt=0)
    """The same ratio's distance from 1, in nats per denoising step, beside `clip_nats`. By default there is none."""

    @model_validator(mode="after")
    def _one_clip_scale(self) -> "ClippedPolicyGradient":
        """Refuse bounds that are given twice, on two scales, or in the wrong order."""
        if self.clip_range is not None and self.clip_nats is not None:
            raise ValueError(f"clip_range is {self.clip_range} and clip_nats {self.clip_nats}: give one of the two")
        for on_mean, in_nats in (("clip_range_high", "clip_nats_high"), ("dual_clip", "dual_clip_nats")):
            wrong, right, own = (
                (in_nats, on_mean, "clip_range") if self.clip_nats is None else (on_mean, in_nats, "clip_nats")
            )
            if getattr(self, wrong) is not None:
                raise ValueError(
                    f"{wrong} is {getattr(self, wrong)}, and the clip range is on the scale of {own}: give {right}, or "
                    f"{'clip_nats' if self.clip_nats is None else 'clip_range'} instead of {own}"
                )
        # In units of one latent element: what is compared here is on one scale.
        check_dual_clip(self.bounds(1), "dual_clip" if self.clip_nats is None else "dual_clip_nats")
        return self

    def bounds(self, latent_elements: int) -> ClipBounds:
        """Return the bounds of the ratio on the scale of `log_prob`, for latents with this many elements."""
        lower = self.clip(latent_elements)
        if self.clip_nats is None:
            return ClipBounds(lower, self.clip_range_high or lower, self.dual_clip)
        upper = lower if self.clip_nats_high is None else self.clip_nats_high / latent_elements
        dual = None if self.dual_clip_nats is None else 1 + self.dual_clip_nats / latent_elements
        return ClipBounds(lower, upper, dual)

    def clip(self, latent_elements: int) -> float:
        """Return the clip range below 1 on the scale of `log_prob`, for latents with this many elements."""
        return self.clip_nats / latent_elements if self.clip_nats is not None else self.clip_range or CLIP_RANGE

    def surrogate(self, step: RatioStep) -> Surrogate:
        bounds = self.bounds(step.latent_elements)
        return clipped(step.log_prob, step.old_log_prob, step, bounds)


def clipped(
    log_prob: Float[Tensor, "B"], old_log_prob: Float[Tensor, "B"], step: RatioStep, bounds: ClipBounds
) -> Surrogate:
    """Return the clipped surrogate of the ratio of these log-probs, and which transitions are clipped."""
    loss = decoupled_surrogate(log_prob, old_log_prob, step.weight, step.advantages, bounds)
    ratio = (log_prob - old_log_prob).detach().exp()
    dual = None if bounds.dual is None else bounds.dual_clips(ratio, step.advantages).float()
    return Surrogate(loss, bounds.outside(ratio), dual)
