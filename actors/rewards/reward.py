"""What every reward promises: images and their prompts in, one number an image out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.registry import Component

Images = UInt8[np.ndarray, "B H W 3"]
LoadedReward = Callable[[Images, list[str], list[dict[str, Any]]], Float[np.ndarray, "B"]]


class RewardMistake(ValueError):
    """A reward answered with the wrong shape or type: no second attempt can mend it, so the run ends at once."""


class Reward(Component, ABC):
    """A reward's hyperparameters. `load` makes it live, and imports what is heavy, in the one process that needs it."""

    @property
    def memory_bytes(self) -> int:
        """What its weights take on the reward worker's device, for `ddpo plan`; 0 where it has none."""
        return 0

    @property
    def independent_of_batch(self) -> bool:
        """Whether an image scores the same bits in whatever batch it stands; only then are batches cut across tasks."""
        return False

    def needs(self) -> tuple[Weights, ...]:
        """The files that `load` reads beside what is installed, for `ddpo doctor`; none where it has no weights."""
        return ()

    def check(self) -> None:
        """ValueError: what it asks elsewhere does not answer as it should. For `ddpo doctor`; loads and changes nothing."""

    @abstractmethod
    def load(self, device: str) -> LoadedReward:
        """The function that scores: (images uint8 [B H W 3], prompts, metadata) -> finite float [B], higher is better."""
