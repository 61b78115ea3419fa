"""RWR: reward-weighted regression, the denoising loss with each image weighted by its reward (DDPO, section 4.2)."""

from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms.advantages import PromptStatistics, softmax_weights
from ray_ddpo.learner.algorithms.forward_process import ForwardProcess
from ray_ddpo.learner.algorithms.losses import squared_error


class RewardWeightedRegression(ForwardProcess):
    """Reward-weighted regression: an image's weight is ∝ exp(inverse_temperature · reward), with mean 1."""

    inverse_temperature: float = Field(default=0.2, gt=0)
    """Factor of the reward in the exponent."""
    over: Literal["round", "prompt"] = "round"
    """Images over which weights have mean 1: the whole round, or those of one prompt in it."""

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        groups = prompts if self.over == "prompt" else [""] * len(prompts)
        return statistics, softmax_weights(rewards, groups, self.inverse_temperature)

    def noised_loss(
        self, predicted: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        return batch.weights * squared_error(predicted, target)
