"""AWM (Xue et al. 2025, arXiv 2509.25050): advantage-weighted matching, PPO's ratio of denoising errors."""

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.trajectory import Column, NoisedBatch
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.denoising_likelihood import Weighting, matching_log_prob
from ray_ddpo.learner.algorithms.forward_process import WeightedMatching
from ray_ddpo.learner.algorithms.losses import clipped_surrogate, squared_error, sum_of


class AdvantageWeightedMatching(WeightedMatching):
    """Advantage-weighted matching: PPO's clipped surrogate, with an image's log-prob taken from its denoising error.

    The log-prob of a noised sample is its negative denoising error, weighted by the noise level.
    """

    advantage_clip: float = Field(default=5.0, gt=0)
    """Absolute value at which advantages are clipped."""
    advantage_max: float = Field(default=1.0, gt=0)
    """Largest advantage in the loss: clipped advantages are divided by `advantage_clip` and multiplied by it."""
    weighting: Weighting = "ghuber"
    """Log-prob from the error e at noise level t: −e, −t e, −t² e, −t √e, or −t e^p / p (generalized Huber)."""
    ghuber_power: float = Field(default=0.25, gt=0, le=1)
    """Power p of the generalized Huber weighting."""
    clip_range: float = Field(default=1.0, gt=0)
    """Clip range of the ratio, on the scale of these log-probs."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean ‖v − v_pretrained‖². The authors use 0.001 and 0.003."""
    behavior_kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean ‖v − v_old‖², with the sampling policy's prediction. The authors use 1 and an average."""

    @model_validator(mode="after")
    def _the_power_is_of_ghuber(self) -> "AdvantageWeightedMatching":
        if self.weighting != "ghuber" and self.ghuber_power != type(self).model_fields["ghuber_power"].default:
            raise ValueError(
                f"ghuber_power is {self.ghuber_power:g} and weighting {self.weighting!r}, which has no power: give "
                'weighting = "ghuber", or leave the key out'
            )
        return self

    @property
    def columns(self) -> set[Column]:
        wanted: dict[Column, bool] = {
            "old_errors": True,
            "old_predictions": self.behavior_kl_coef > 0,
            "reference_predictions": self.kl_coef > 0,
        }
        return {name for name, is_wanted in wanted.items() if is_wanted}

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        return advantages.clip(-self.advantage_clip, self.advantage_clip) * (self.advantage_max / self.advantage_clip)

    def noised_result(
        self,
        predicted: Float[Tensor, "B C *S"],
        target: Float[Tensor, "B C *S"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> TransitionLoss:
        # On a flow model the scale is the noise level t; a UNet has scale 1, and so no weighting by it.
        errors = squared_error(predicted, target)
        old_errors = errors.detach() if batch.old_errors is None else batch.old_errors
        log_prob, old = (
            matching_log_prob(each, clean_scale, self.weighting, self.ghuber_power) for each in (errors, old_errors)
        )
        terms = {"policy": clipped_surrogate(log_prob, old, batch.weights, self.clip_range).to(predicted.dtype)}
        if batch.reference_predictions is not None:
            terms["kl"] = self.kl_coef * squared_error(predicted, batch.reference_predictions)
        if self.behavior_kl_coef > 0:
            before = predicted.detach() if batch.old_predictions is None else batch.old_predictions
            terms["behavior_kl"] = self.behavior_kl_coef * squared_error(predicted, before)
        clipped = (((log_prob - old).detach().exp() - 1).abs() > self.clip_range).to(predicted.dtype)
        return TransitionLoss(sum_of(terms), clipped=clipped, terms=terms)
