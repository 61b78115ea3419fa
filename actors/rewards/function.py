"""A function of the user's as a reward: any `module:function` that can be imported."""

from typing import Any

import numpy as np
from pydantic import Field

from actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from common.registry import import_object


class Function(Reward):
    """`path` is module:function; the function takes (images uint8 [B,H,W,3], prompts, metadata) and returns [B]."""

    path: str = Field(pattern=r"^[\w.]+:\w+$")
    independent: bool = False  # whether it scores a picture alike, to the bit, in whatever batch

    def user_modules(self) -> dict[str, str]:
        return {**super().user_modules(), "path": self.path.partition(":")[0]}

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def load(self, device: str) -> LoadedReward:
        function = import_object(self.path, "reward.path")

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            rewards = np.asarray(function(images, prompts, metadata))
            if rewards.shape != (len(images),) or not np.issubdtype(rewards.dtype, np.number):
                raise RewardMistake(
                    f"{self.path} returned {rewards.dtype} of shape {rewards.shape}: it must return real numbers of shape "
                    f"({len(images)},), one a picture"
                )
            return rewards.astype(np.float32)

        return score
