"""A function of the user's as a reward: any `module:function` that can be imported."""

from typing import Any

import numpy as np
from pydantic import Field

from actors.rewards.reward import Images, LoadedReward, Reward
from common.registry import import_object


class Function(Reward):
    """`path` is module:function; the function takes (images uint8 [B,H,W,3], prompts, metadata) and returns [B]."""

    path: str = Field(pattern=r"^[\w.]+:\w+$")

    def load(self, device: str) -> LoadedReward:
        function = import_object(self.path, "reward.path")

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            rewards = np.asarray(function(images, prompts, metadata), dtype=np.float32)
            if rewards.shape != (len(images),):
                raise ValueError(
                    f"{self.path} returned the shape {rewards.shape}: it must be ({len(images)},), one a picture"
                )
            return rewards

        return score
