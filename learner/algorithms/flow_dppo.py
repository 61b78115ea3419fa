"""Flow-DPPO (arXiv 2606.11025): a trust region on the exact KL of a step, in the place of the ratio's clip."""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.off_policy import drift_nats, within_drift
from ray_ddpo.learner.algorithms.policy_gradient import RatioPolicyGradient, RatioStep, Surrogate

TRUST_REGION = 1e-5  # the authors', on the mean scale


class FlowDPPO(RatioPolicyGradient):
    """GRPO without a clip: a transition is left out if its step has moved too far, and moves on in the same direction.

    The KL is to the policy in the ratio's denominator. A step that moves back towards that policy always counts.
    """

    compares_means: ClassVar[bool] = True

    advantages: AdvantageSettings = AdvantageSettings(kind="group", group_deviation="round")
    """Computation of advantages from rewards: by default the distance from the group's mean, over the round's std."""
    trust_region: float | None = Field(default=None, gt=0)
    """KL of a step above which it is held, as a mean over latent elements. By default 1e-5.

    The default does not hold if `trust_region_nats` is given.
    """
    trust_region_nats: float | None = Field(default=None, gt=0)
    """The same KL in nats per denoising step. Give this or `trust_region`."""

    @model_validator(mode="after")
    def _one_trust_region(self) -> "FlowDPPO":
        if self.trust_region is not None and self.trust_region_nats is not None:
            raise ValueError(
                f"trust_region is {self.trust_region} and trust_region_nats {self.trust_region_nats}: give one of the "
                "two"
            )
        return self

    def limit_nats(self, latent_elements: int) -> float:
        """Return the trust region in nats, for latents with this many elements."""
        return self.trust_region_nats or (self.trust_region or TRUST_REGION) * latent_elements

    def surrogate(self, step: RatioStep) -> Surrogate:
        drift = drift_nats(step.transition, Transition(step.old_means, step.transition.std))
        log_ratio = step.log_prob - step.old_log_prob
        held = distrusted(log_ratio.detach(), drift, step.advantages, self.limit_nats(step.latent_elements))
        return Surrogate(step.weight * trusted_surrogate(log_ratio, held, step.advantages), distrusted=held)


def distrusted(
    log_ratio: Float[Tensor, "B"], drift: Float[Tensor, "B"], advantages: Float[Tensor, "B"], limit_nats: float
) -> Float[Tensor, "B"]:
    """Return 1 for a step beyond the trust region that its advantage moves further away, else 0 (eq. 18).

    A good action moves away if it is more likely than before, a bad one if it is less likely.
    """
    moves_away = (log_ratio > 0) & (advantages > 0) | (log_ratio < 0) & (advantages < 0)
    return (1 - within_drift(drift, limit_nats)) * moves_away


def trusted_surrogate(
    log_ratio: Float[Tensor, "B"], held: Float[Tensor, "B"], advantages: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Return −A r, and 0 without gradient where `held` is 1."""
    ratio = torch.where(held > 0, 0.0, log_ratio).exp()  # a held ratio may overflow, and 0 · inf has no gradient
    return torch.where(held > 0, 0.0, -advantages * ratio)
