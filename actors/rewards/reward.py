"""The interface of a reward: images and prompts in, one number an image out."""

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
    """A reward returned the wrong shape or type. A retry cannot help, so the run ends at once."""


class Reward(Component, ABC):
    """A reward's hyperparameters. `load` loads its weights, with heavy imports, in the process that needs them."""

    @property
    def memory_bytes(self) -> int:
        """The size of the weights on the reward worker's device, for `ddpo plan`; 0 if there are none."""
        return 0

    @property
    def independent_of_batch(self) -> bool:
        """True if an image's score has the same bits in any batch. Only then batches contain several tasks' images."""
        return False

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that `load` reads, for `ddpo doctor`; none if there are no weights."""
        return ()

    def check(self) -> None:
        """Check that an external service answers, for `ddpo doctor`, without loading or changing anything.

        Raises:
            ValueError: the service does not answer as it should.
        """

    @abstractmethod
    def load(self, device: str) -> LoadedReward:
        """Return the function (images uint8 [B H W 3], prompts, metadata) -> finite float [B]; higher is better."""
