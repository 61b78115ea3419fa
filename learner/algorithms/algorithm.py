"""What every algorithm promises: advantages from rewards, and a loss on (image, step) pairs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from common.diffusion.policy import Policy
from common.registry import Entry
from common.trajectory import TransitionBatch
from learner.advantages import PromptStatistics, extend_statistics, per_prompt_advantages, round_advantages


@dataclass(frozen=True)
class PairLoss:
    """An algorithm's loss and what it looked at, one value a pair; the last two for metrics, without gradient."""

    loss: Float[Tensor, "B"]
    log_ratio: Float[Tensor, "B"]  # log_prob − old_log_prob
    clipped: Float[Tensor, "B"]  # 1 where the ratio is outside its range


class AdvantageSettings(Entry):
    """Per-prompt running statistics (the default of the lineage), or the whole round's."""

    kind: Literal["per_prompt", "round"] = "per_prompt"
    buffer_size: int = Field(default=32, ge=1)  # rewards kept a prompt
    min_count: int = Field(default=16, ge=1)  # with fewer, the whole round's mean and deviation

    @model_validator(mode="after")
    def _buffer_holds_min_count(self) -> "AdvantageSettings":
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count {self.min_count} is above buffer_size {self.buffer_size}: it would never be reached"
            )
        return self

    def advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"]
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """The statistics with this round in them, and each image's advantage."""
        if self.kind == "round":
            return statistics, round_advantages(rewards)
        statistics = extend_statistics(statistics, prompts, rewards, self.buffer_size)
        return statistics, per_prompt_advantages(statistics, prompts, rewards, self.min_count)


class Algorithm(Entry, ABC):
    """An algorithm's hyperparameters, and its mathematics."""

    advantages: AdvantageSettings = AdvantageSettings()

    @abstractmethod
    def pair_loss(self, policy: Policy, batch: TransitionBatch) -> PairLoss:
        """The loss of each pair under the policy's present weights, with gradients."""
