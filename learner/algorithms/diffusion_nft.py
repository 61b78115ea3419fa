"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): negative-aware fine-tuning, without log-probs."""

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.transition import column
from ray_ddpo.common.trajectory import Column, NoisedBatch
from ray_ddpo.learner.algorithms.advantages import AdvantageMode, optimality
from ray_ddpo.learner.algorithms.forward_process import WeightedMatching
from ray_ddpo.learner.algorithms.losses import negative_aware_terms, squared_error


class DiffusionNFT(WeightedMatching):
    """DiffusionNFT: the loss pulls the policy towards an image by r and away by 1 − r; r in 0 … 1 is its optimality.

    Samplers use a moving average of the trained weights, whose decay grows with the policy version.
    """

    advantage_clip: float = Field(default=5.0, gt=0)
    """Advantage at which r is 0 or 1. The loss is multiplied by it."""
    advantage_mode: AdvantageMode = "all"
    """Advantages that r is computed from: all, those above 0, those below 0, 1 for those above 0, or their signs."""
    beta: float = Field(default=1.0, gt=0)
    """Distance of the implicit positive and negative policies from the sampling policy."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean ‖v − v_pretrained‖². The authors use 1e-4."""
    ema_decay_growth: float = Field(default=0.001, ge=0)
    """Increase of the moving average's decay per policy version. 0: samplers use the trained weights."""

    @property
    def columns(self) -> set[Column]:
        return {"old_predictions", "reference_predictions"} if self.kl_coef > 0 else {"old_predictions"}

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        return optimality(advantages, self.advantage_clip, self.advantage_mode)

    def noised_terms(
        self,
        predicted: Float[Tensor, "B C *S"],
        target: Float[Tensor, "B C *S"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> dict[str, Float[Tensor, "B"]]:
        old = predicted.detach() if batch.old_predictions is None else batch.old_predictions
        # The paper's squared errors are of clean latents, whose error is the prediction's times this scale.
        scale = column(clean_scale, predicted)
        terms = negative_aware_terms(scale * predicted, scale * old, scale * target, batch.weights, self.beta)
        terms = {name: self.advantage_clip * term for name, term in terms.items()}
        if batch.reference_predictions is not None:
            terms["kl"] = self.kl_coef * squared_error(predicted, batch.reference_predictions)
        return terms
