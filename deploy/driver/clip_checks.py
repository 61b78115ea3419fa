"""Refuse rewards and keys that do not go with clips, or with images."""

from collections.abc import Mapping

from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.packages import require_packages
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.video_files import PACKAGE


def check_video_package(policy: PolicyConfig) -> None:
    """Raise ValueError if the family makes clips, and the package that writes their files is not installed."""
    if policy.has_frames:
        require_packages("the recipe's policy, a family of video,", PACKAGE)


def check_clips(recipe: Recipe, policy: PolicyConfig, rewards: Mapping[str, Reward]) -> None:
    """Check that rewards go with what the family makes.

    Args:
        recipe: the recipe.
        policy: the model family.
        rewards: rewards and scorers by name. A user's function is imported to see whether it takes clips.

    Raises:
        ValueError: a reward takes clips and the family makes images, or keys on frames have no effect.
    """
    frames: int = getattr(policy, "num_frames", 1)
    made = f"policy.num_frames is {frames}" if policy.has_frames else f"{type(policy).__name__} makes images"
    for table in (*recipe.all_rewards, *recipe.scorers):
        _check_reward(table, rewards[table.called], made, frames if policy.has_frames else 0)


def _check_reward(table: RewardTable, reward: Reward, made: str, frames: int) -> None:
    """Check one reward; `frames` is 0 for a family of images."""
    called = f"the reward {table.called!r}"
    if reward.takes_clips and frames < 2:
        raise ValueError(
            f"{called} scores clips, and {made}: take a family of video such as wan, with several frames, or a reward of "
            "images"
        )
    given = {"frames": table.frames, "scored_frames": table.scored_frames}
    given = {key: value for key, value in given.items() if value not in ("mean", None)}
    if not given:
        return
    key, value = next(iter(given.items()))
    if not frames:
        raise ValueError(f"{key} of {called} is {value!r}, and {made}, which have no frames: leave the key out")
    if reward.takes_clips:
        raise ValueError(f"{key} of {called} is {value!r}, and it scores complete clips: leave the key out")
    if (table.scored_frames or 0) > frames:
        raise ValueError(f"scored_frames of {called} is {table.scored_frames}, and {made}: give fewer, or leave it out")
