"""The side of a preference pair as a reward: 1 for the chosen image, −1 for the rejected one."""

import numpy as np

from ray_ddpo.actors.rewards.reward import LoadedReward, Reward

REWARDS = {"chosen": 1.0, "rejected": -1.0}


class Preference(Reward):
    """The side of an image in its pair, as the prompt source `preferences` says it. Pixels are not looked at.

    Held-out images are sampled and have no side. Their reward is 0.
    """

    def load(self, device: str) -> LoadedReward:
        return lambda images, prompts, metadata: np.array(
            [REWARDS.get(about.get("side", ""), 0.0) for about in metadata], np.float32
        )

    @property
    def independent_of_batch(self) -> bool:
        return True
