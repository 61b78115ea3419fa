"""Refuse recipes whose algorithm needs the reward's gradient and whose reward has none, and the reverse."""

from collections.abc import Mapping

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import component_class
from ray_ddpo.learner.algorithms.algorithm import Algorithm


def check_reward_gradients(
    recipe: Recipe, policy: PolicyConfig, algorithm: Algorithm, rewards: Mapping[str, Reward]
) -> None:
    """Check that every reward that is trained on has the gradient that the algorithm needs.

    Raises:
        ValueError: a reward has none, as all of a family of video, or `sampling.backprop_steps` is given to an
            algorithm without gradients.
    """
    name = recipe.algorithm.name
    if algorithm.restarts_per_image is None:
        if recipe.sampling.backprop_steps is not None:
            raise ValueError(
                f"sampling.backprop_steps is {recipe.sampling.backprop_steps} and algorithm.name {name!r}, which learns "
                "without the reward's gradient: leave it out"
            )
        return
    if policy.has_frames:
        frames = getattr(policy, "num_frames", 1)
        raise ValueError(
            f"algorithm.name is {name!r}, which needs the gradient of the reward, and policy.num_frames is {frames}: "
            "gradients are of images only; take an algorithm without, such as grpo"
        )
    for table in recipe.all_rewards:
        if table.weight and not rewards[table.called].is_differentiable:
            raise ValueError(
                f"algorithm.name is {name!r}, which needs the gradient of the reward, and {table.called!r} has none: "
                f"those that have one are {differentiable_rewards()}, a function with differentiable = true, and a "
                "Reward of your own with load_differentiable; without a gradient take an algorithm such as ddpo_is"
            )


def differentiable_rewards() -> list[str]:
    """Return the names of this package's rewards that override `load_differentiable`."""
    classes = {name: component_class(REWARDS, name, "reward") for name in REWARDS if name != "function"}
    has_one = Reward.load_differentiable
    return [name for name, cls in classes.items() if getattr(cls, "load_differentiable", has_one) is not has_one]
