"""Try a user's reward on synthetic images before the first round: its signature and its result."""

from typing import Any, cast

import numpy as np

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.common.clips import Pixels
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own

IMAGES = 2
FRAMES = 3  # of a synthetic clip
SIDE = 64  # pixels of a synthetic image; if a reward needs another size and raises, that is no mistake


def load_reward(reward: Reward, device: str) -> LoadedReward:
    """Load a reward.

    Raises:
        ValueError: a user's reward raises, or returns no callable.
    """
    if not is_users_own(reward, REWARDS):
        return reward.load(device)
    loaded: Any = call(reward, "load", device)
    if not callable(loaded):
        raise ValueError(
            f"{type(reward).__name__}.load returned {type(loaded).__name__}: expected a function of (images, prompts, "
            "metadata)"
        )
    return cast(LoadedReward, loaded)


def try_rewards(rewards: dict[str, Reward], loaded: dict[str, LoadedReward]) -> None:
    """Score two synthetic images, or clips, with the user's rewards.

    Prompts are synthetic too, because a reward may do something with a run's prompt that must happen only for its
    image.

    Raises:
        RewardMistake: a reward does not return one number for each image.
    """
    clips = np.random.default_rng(0).integers(0, 256, (IMAGES, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    for name, reward in rewards.items():
        if isinstance(reward, FunctionReward) or is_users_own(reward, REWARDS):
            with undisturbed():
                _try(name, loaded[name], clips if reward.takes_clips else clips[:, 0])


def _try(name: str, reward: LoadedReward, pixels: Pixels) -> None:
    """Raise RewardMistake if a result is wrong. Other errors are ignored: the reward may need real images."""
    try:
        with blamed(f"the reward {name!r}"):
            values = np.asarray(reward(pixels.copy(), ["made up"] * IMAGES, [{} for _ in range(IMAGES)]))
    except ValueError as error:
        if isinstance(error.__cause__, RewardMistake):
            raise error.__cause__ from error
        return  # noise may be no valid image for the reward: the first batch shows
    if values.shape != (IMAGES,) or values.dtype.kind not in "iuf":
        raise RewardMistake(
            f"the reward {name!r} returned {values.dtype} of shape {values.shape} for {IMAGES} made-up images: it must "
            f"return one real number for each, of shape ({IMAGES},)"
        )
