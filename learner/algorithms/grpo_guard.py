"""GRPO-Guard (Wang et al. 2025, arXiv 2510.22319): a ratio that is centered and scaled alike at every step."""

from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.clip_bounds import ClipBounds, check_dual_clip
from ray_ddpo.learner.algorithms.losses import sum_of
from ray_ddpo.learner.algorithms.policy_gradient import RatioPolicyGradient, RatioStep, Surrogate, clipped


class GRPOGuard(RatioPolicyGradient):
    """GRPO with a normalized ratio, and with losses divided by the step's size.

    The clip range is on the scale of the normalized log-ratio, the mean over latent elements of Δμ · ε. So it is in
    units of latents, and not in nats.
    """

    compares_means: ClassVar[bool] = True

    advantages: AdvantageSettings = AdvantageSettings(kind="group")
    """Computation of advantages from rewards: by default within a group."""
    clip_range: float = Field(default=2e-6, gt=0)
    """Clip range of the normalized ratio."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Clip range above 1; `clip_range` is then the one below 1. By default both are equal."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Normalized ratio above which the loss of a negative advantage no longer grows. By default there is none."""

    @model_validator(mode="after")
    def _dual_clip_is_above_the_range(self) -> "GRPOGuard":
        check_dual_clip(self.bounds, "dual_clip")
        return self

    @property
    def bounds(self) -> ClipBounds:
        """The bounds of the normalized ratio."""
        return ClipBounds(self.clip_range, self.clip_range_high or self.clip_range, self.dual_clip)

    def surrogate(self, step: RatioStep) -> Surrogate:
        log_ratio = normalized_log_ratio(step)
        return clipped(log_ratio, log_ratio.new_zeros(len(log_ratio)), step, self.bounds)

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        assert isinstance(batch, TransitionBatch), "this algorithm trains on sampled transitions"
        result = super().compute_loss(policy, batch)
        terms = {**result.terms, "policy": result.terms["policy"] / policy.step_sizes()[batch.steps]}
        return replace(result, loss=sum_of(terms), terms=terms)


def normalized_log_ratio(step: RatioStep) -> Float[Tensor, "B"]:
    """Return σ (log r + ‖Δμ‖² / (2σ²)), with log r and the square as means over latent elements (eq. 8).

    For latents that the old policy sampled with noise ε this is the mean of Δμ · ε: its mean is 0, where that of log r
    is below 0, and σ is in it no more.
    """
    square = (step.transition.mean - step.old_means).square().flatten(1).mean(1)
    std = step.transition.std
    return std * (step.log_prob - step.old_log_prob) + square / (2 * std)
