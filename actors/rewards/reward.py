"""The interface of a reward: images and prompts in, one number an image out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from ray_ddpo.common.clips import Pixels
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.user_code.sources import is_of_the_project

Images = UInt8[np.ndarray, "B H W 3"]
Clips = UInt8[np.ndarray, "B F H W 3"]
LoadedReward = Callable[[Pixels, list[str], list[dict[str, Any]]], Float[np.ndarray, "B"]]


@runtime_checkable
class Metered(Protocol):
    """A loaded reward that counts its costs, such as the tokens of a service."""

    def take_usage(self) -> dict[str, float]:
        """Return the counts by name since the last call, and count from 0 again."""
        ...


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

    @property
    def takes_clips(self) -> bool:
        """True if `load` returns a function of complete clips, uint8 [B F H W 3]. Others get the frames as images."""
        return False

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The lowest and the highest possible score, for the metric `reward/saturation`; None if there is no bound."""
        return None

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that `load` reads, for `ddpo doctor`; none if there are no weights."""
        return ()

    def check(self) -> None:
        """Check that an external service answers, for `ddpo doctor`, without loading or changing anything.

        Raises:
            ValueError: the service does not answer as it should.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts and their metadata can be scored, before anything is sampled. By default all can.

        Raises:
            ValueError: a prompt cannot be scored; the message names it.
        """

    @abstractmethod
    def load(self, device: str) -> LoadedReward:
        """Return the function (images uint8 [B H W 3], prompts, metadata) -> finite float [B]; higher is better."""

    @property
    def users_code(self) -> str | None:
        """Return the user's code that scores, as errors name it; None if the reward is one of this package."""
        return None if is_of_the_project(type(self).__module__) else type(self).__name__

    @property
    def is_differentiable(self) -> bool:
        """Return whether the reward has a gradient: by default, if its class overrides `load_differentiable`."""
        return type(self).load_differentiable is not Reward.load_differentiable

    def load_differentiable(self, device: str) -> DifferentiableReward:
        """Return the same reward as a differentiable function, for the learner.

        It takes images as float [B, 3, H, W] from 0 to 1, prompts and metadata. Its scores are those of `load` for the
        images rounded to uint8.

        Raises:
            ValueError: the reward has no gradient. This is the default.
        """
        raise ValueError(f"{type(self).__name__} has no gradient with respect to the images")
