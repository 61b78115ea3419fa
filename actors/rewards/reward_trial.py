"""Try a reward of the user's own on made-up images before the first round: how it is called, and what it must return."""

from typing import Any, cast

import numpy as np

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.function import Function
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.user_code.blame import blamed, call, is_users_own

IMAGES = 2
SIDE = 64  # pixels of a made-up image; a reward that needs others raises, which says nothing against it


def load_reward(reward: Reward, device: str) -> LoadedReward:
    """Load a reward. ValueError: one of the user's own raises, or returns nothing that can be called."""
    if not is_users_own(reward, REWARDS):
        return reward.load(device)
    loaded: Any = call(reward, "load", device)
    if not callable(loaded):
        raise ValueError(
            f"{type(reward).__name__}.load returned {type(loaded).__name__}: expected a function of (images, prompts, metadata)"
        )
    return cast(LoadedReward, loaded)


def try_rewards(rewards: dict[str, Reward], loaded: dict[str, LoadedReward]) -> None:
    """Score two made-up images with the user's own rewards.

    Prompts are made up too: what a reward does with one of the run's prompts, it is to do with that prompt's image alone.

    Raises:
        RewardMistake: a reward returns something else than one number for each image.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    for name, reward in rewards.items():
        if isinstance(reward, Function) or is_users_own(reward, REWARDS):
            with undisturbed():
                _try(name, loaded[name], pixels)


def _try(name: str, reward: LoadedReward, pixels: Images) -> None:
    try:
        with blamed(f"the reward {name!r}"):
            values = np.asarray(reward(pixels.copy(), ["made up"] * IMAGES, [{} for _ in range(IMAGES)]))
    except ValueError as error:
        if isinstance(error.__cause__, RewardMistake):
            raise error.__cause__ from error
        return  # noise is no image that the reward knows: the first batch tells
    if values.shape != (IMAGES,) or values.dtype.kind not in "iuf":
        raise RewardMistake(
            f"the reward {name!r} returned {values.dtype} of shape {values.shape} for {IMAGES} made-up images: it must "
            f"return one real number for each, of shape ({IMAGES},)"
        )
