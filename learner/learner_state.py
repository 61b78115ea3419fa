"""LearnerState: all that the learner needs to go on to the last bit; what a checkpoint holds of it."""

from dataclasses import dataclass

import numpy as np

from common.lora_weights import LoraWeights


@dataclass(frozen=True)
class LearnerState:
    """The published weights, those that are trained, the optimizer's moments, and the gradient scaler."""

    policy_version: int
    weights: tuple[LoraWeights, ...]  # published: of the last max_policy_lag + 1 versions, the newest last
    optimizer: dict[str, np.ndarray]  # "<parameter>/<AdamW's own key>"
    scaler: dict[str, int | float]  # of float16's gradient scaler; empty otherwise
    own_weights: LoraWeights | None = None  # those that are trained, where samplers draw with an average of versions

    @property
    def trained(self) -> LoraWeights:
        """The weights that are trained; they are the newest published ones, unless those are an average."""
        return self.own_weights or self.weights[-1]
