"""RWR-sparse: reward-weighted regression with weights 0 and 1, so on the best images alone (DDPO, section 4.2)."""

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms.advantages import PromptStatistics, extend_statistics, sparse_weights
from ray_ddpo.learner.algorithms.forward_process import ForwardProcess
from ray_ddpo.learner.algorithms.losses import squared_error


class SparseRewardWeightedRegression(ForwardProcess):
    """Sparse reward-weighted regression: trains on the images at or above a percentile of their prompt's last rewards.

    The last rewards include this round's. All other images enter no optimizer step.
    If the selected images are no multiple of an optimizer step's, the last step has the remainder as well.
    """

    percentile: float = Field(default=90.0, ge=0, lt=100)
    """Percentile of the prompt's last rewards that an image must reach."""
    buffer_size: int = Field(default=256, ge=1)
    """Last rewards that are kept for each prompt."""
    min_count: int = Field(default=16, ge=1)
    """Rewards of a prompt below which its images are compared with the whole round."""

    @property
    def trained_fraction(self) -> float:
        return 1 - self.percentile / 100

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        statistics = extend_statistics(statistics, prompts, rewards, self.buffer_size)
        return statistics, sparse_weights(statistics, prompts, rewards, self.percentile, self.min_count)

    def noised_loss(
        self, predicted: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        return squared_error(predicted, target)
