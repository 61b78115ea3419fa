"""Refuse recipes that cannot train on the images of a preference file."""

from collections.abc import Mapping

from ray_ddpo.actors.rewards.preference import Preference
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.prompts import PromptSource
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.algorithm import Algorithm


def check_given_images(
    recipe: Recipe, policy: PolicyConfig, source: PromptSource, algorithm: Algorithm, rewards: Mapping[str, Reward]
) -> None:
    """Check that the rest of a recipe goes with a prompt source that gives images, and with the reward of its pairs.

    Raises:
        ValueError: a setting needs sampled images, or the reward needs a preference file.
    """
    sides, named = [name for name, reward in rewards.items() if isinstance(reward, Preference)], recipe.prompts.name
    if not source.gives_images:
        if sides:
            raise ValueError(
                f"the reward {sides[0]!r} is the side of a pair in a preference file, and prompts.name is {named!r}: give "
                'prompts.name = "preferences", or another reward'
            )
        return
    gives = f"prompts.name is {named!r}, which gives images in place of sampling"
    if recipe.prompts.images_per_prompt != 2:
        raise ValueError(
            f"{gives}, and prompts.images_per_prompt {recipe.prompts.images_per_prompt}: a group is a pair, so give 2"
        )
    if not policy.takes_images:
        raise ValueError(
            f"{gives}, and {type(policy).__name__} has no encoder, as it says with takes_images = False: take another "
            "prompt source, or give the family encode_images"
        )
    if algorithm.restarts_per_image is not None:
        raise ValueError(
            f"{gives}, and {type(algorithm).__name__} trains on the last denoising steps of sampled images: give an "
            "algorithm on noised samples, such as dpo"
        )
    if algorithm.refill_attempts:
        raise ValueError(f"{gives}, and the algorithm refills rounds: every pair has its order, so leave refill out")
    if not recipe.sampling.deterministic:
        raise ValueError(
            f"{gives}, and sampling.deterministic is false: given images have no log-probs, so give "
            "sampling.deterministic = true, and an algorithm on noised samples, such as dpo"
        )
    best_by = recipe.guard.best_by
    if recipe.evaluation.every and (best_by in sides or (best_by == "reward" and len(sides) == len(rewards))):
        raise ValueError(
            f"guard.best_by is {best_by!r}, and the reward {sides[0]!r} is 0 for every sampled image: give "
            "one of evaluation.scorers"
        )
