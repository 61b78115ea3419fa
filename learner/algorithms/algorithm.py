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
    """An algorithm's loss and what it looked at, one value a pair; all but the loss without gradient."""

    loss: Float[Tensor, "B"]
    log_ratio: Float[Tensor, "B"]  # log_prob − old_log_prob
    clipped: Float[Tensor, "B"]  # 1 where the loss's ratio is outside its range
    kept: Float[Tensor, "B"] | None = None  # 0 where a pair is masked: its loss is 0 and the denominator leaves it out
    behaviour_weight: Float[Tensor, "B"] | None = None


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


class OffPolicySettings(Entry):
    """What is made of a policy that has moved since it drew (`learner/off_policy.py`); by default nothing but the ratio."""

    ratio: Literal["behaviour", "proximal"] = "behaviour"  # against the policy that drew, or that at the update's start
    # Weigh pairs by π_prox / π_behaviour, its logarithm held within ± this on the scale of log_prob; none: by 1.
    behaviour_weight: float | None = Field(default=None, gt=0)
    max_drift_nats: float | None = Field(default=None, gt=0)  # of a step's mean; a pair beyond is left out

    @model_validator(mode="after")
    def _weight_belongs_to_the_proximal_ratio(self) -> "OffPolicySettings":
        if self.behaviour_weight is not None and self.ratio != "proximal":
            raise ValueError(
                f"behaviour_weight is {self.behaviour_weight} and ratio {self.ratio!r}, which has that weight in it "
                'already: give ratio = "proximal", or no behaviour_weight'
            )
        return self


class Algorithm(Entry, ABC):
    """An algorithm's hyperparameters, and its mathematics."""

    advantages: AdvantageSettings = AdvantageSettings()

    @property
    def needs_proximal_log_probs(self) -> bool:
        """Whether `pair_loss` reads `proximal_log_probs`, which cost a forward pass after a round's first optimizer step."""
        return False

    @property
    def needs_behaviour_means(self) -> bool:
        """Whether `pair_loss` reads `behaviour_means`, which cost a forward pass under the weights that drew."""
        return False

    @abstractmethod
    def pair_loss(self, policy: Policy, batch: TransitionBatch) -> PairLoss:
        """The loss of each pair under the policy's present weights, with gradients."""
