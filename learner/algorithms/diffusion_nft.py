"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): negative-aware fine-tuning on the forward process, without log-probs."""

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.config import Recipe
from common.trajectory import NoisedBatch
from learner.advantages import PromptStatistics, optimality
from learner.algorithms.advantage_settings import AdvantageSettings
from learner.algorithms.forward_process import ForwardProcess
from learner.losses import negative_aware_loss


class DiffusionNFT(ForwardProcess):
    """Of an image, r in 0 … 1 says how much it belongs to the good ones; the loss pulls towards it by r and away by 1 − r.

    Samplers draw with a moving average of the trained weights, whose decay grows with the policy version:
    min(average_decay_max, average_decay_growth · version).
    """

    advantages: AdvantageSettings = AdvantageSettings(kind="round")
    advantage_clip: float = Field(default=5.0, gt=0)  # at which r is 0 or 1
    beta: float = Field(default=1.0, gt=0)  # how far the positive and negative policies stand from the one that drew
    average_decay_growth: float = Field(default=0.001, ge=0)
    average_decay_max: float = Field(default=0.5, ge=0, lt=1)

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        self.advantages.check(recipe)

    @property
    def needs_old_predictions(self) -> bool:
        return True

    def average_decay(self, policy_version: int) -> float:
        return min(self.average_decay_max, self.average_decay_growth * policy_version)

    @property
    def comparison(self) -> AdvantageSettings:
        return self.advantages

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        return optimality(advantages, self.advantage_clip)

    def worth(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        statistics, advantages = self.advantages.advantages(statistics, prompts, rewards, images_per_prompt)
        return statistics, self.from_advantages(advantages)

    def noised_loss(
        self, predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        old = predicted.detach() if batch.old_predictions is None else batch.old_predictions
        return negative_aware_loss(predicted, old, target, batch.worth, self.beta)
