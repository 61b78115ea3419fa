"""Selection of images: which of a group's images are trained on, as a pure function of their advantages."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component

MOST_REFILLS = 100


def check_refill(attempts: int, recipe: Recipe, key: str) -> None:
    """Check that the rounds of a recipe can be refilled.

    Args:
        attempts: how often; 0 is always allowed.
        recipe: the recipe.
        key: the recipe's key that says so.

    Raises:
        ValueError: there are no groups, an update begins before the round is complete, or every group has spread.
    """
    if attempts and recipe.prompts.images_per_prompt < 2:
        raise ValueError(
            f"{key} is {attempts} and prompts.images_per_prompt {recipe.prompts.images_per_prompt}: groups with equal "
            "rewards are replaced, and a group needs at least 2 images of one prompt"
        )
    if attempts and recipe.learner.parts_per_round > 1:
        raise ValueError(
            f"{key} is {attempts} and learner.parts_per_round {recipe.learner.parts_per_round}: a round is refilled when "
            "all of its images are scored; give one of the two"
        )
    if attempts and recipe.sampling.kl_reward:
        raise ValueError(
            f"{key} is {attempts} and sampling.kl_reward {recipe.sampling.kl_reward:g}: the KL, which is subtracted from the "
            "reward, differs within every group, so none would be replaced; give one of the two"
        )


class SelectionSettings(Component):
    """Images that enter optimizer steps. The others are sampled, scored and part of the baseline, and no more."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of each group that is trained on: half of it the images with the largest advantages, half the smallest.

    With `prompts.images_per_prompt` = 1, the round counts as one group.
    """
    keep: Literal["extremes", "best"] = "extremes"
    """Images of that fraction: both ends of a group (`extremes`), or those with the largest advantages only (`best`)."""
    skip_zero: bool = False
    """Leave out images whose advantage is 0, such as those of a group with equal rewards."""

    refill: int = Field(default=0, ge=0, le=MOST_REFILLS)
    """Further samplings of a round, each with as many groups as it lacks because their rewards are all equal.

    Such groups are left out, as images whose advantage is 0. DAPO calls this dynamic sampling.
    """

    @property
    def leaves_out(self) -> bool:
        """Return whether images may be left out."""
        return self.fraction < 1 or self.skip_zero or self.refill > 0

    def count(self, group_size: int) -> int:
        """Return how many images of a group are trained on."""
        return round(self.fraction * group_size)

    def group_size(self, recipe: Recipe) -> int:
        """Return the images of a group. Without groups, a round or its part counts as one."""
        group = recipe.prompts.images_per_prompt
        return group if group > 1 else recipe.images_per_round // recipe.learner.parts_per_round

    def check(self, recipe: Recipe) -> None:
        """Check the settings against the rest of the recipe.

        Raises:
            ValueError: too few images of a group would be trained on, or the best of a group are all of it.
        """
        size, fewest = self.group_size(recipe), 1 if self.keep == "best" else 2
        if self.keep == "best" and self.fraction == 1:
            raise ValueError(
                'algorithm.selection.keep is "best" and fraction 1, which keeps all images of a group: give a fraction '
                "below 1, or leave keep out"
            )
        if self.fraction < 1 and self.count(size) < fewest:
            left = "at least the best of them" if self.keep == "best" else "at least 2 of them, the best and the worst,"
            raise ValueError(
                f"algorithm.selection.fraction is {self.fraction:g} and a group has {size} images: {left} must be "
                f"left, so give at least {fewest / size:g}"
            )

    def select(self, advantages: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
        """Return the advantages, with 0 for images that are not trained on.

        Args:
            advantages: one per image. The images of a group are neighbors.
            images_per_prompt: images of a group.
        """
        if self.fraction == 1 or not len(advantages):
            return advantages
        groups = advantages.reshape(-1, images_per_prompt if images_per_prompt > 1 else len(advantages))
        chosen = best if self.keep == "best" else extremes
        return np.where(chosen(groups, self.count(groups.shape[1])), groups, 0.0).ravel()


def best(groups: Float[np.ndarray, "G N"], count: int) -> Bool[np.ndarray, "G N"]:
    """Return the mask of each group's `count` images with the largest values; of equal ones, the first images.

    With a policy gradient the mean of the kept advantages is above 0, so that the gradient also raises the log-probs of
    what was sampled often. It is biased towards the group's best image, as in best-of-K and expert iteration.
    """
    order = (-groups).argsort(axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :count], True, axis=1)
    return mask


def extremes(groups: Float[np.ndarray, "G N"], count: int) -> Bool[np.ndarray, "G N"]:
    """Return the mask of each group's `count` images with the largest and the smallest advantages.

    Half of them are the largest, and the odd one too. Of equal advantages the first image counts as the smaller. PODS
    (arXiv 2504.13818) keeps the subset of largest variance, which is of this form: some of the largest, the rest of the
    smallest.
    """
    order = groups.argsort(axis=1, kind="stable")
    smallest = count // 2
    chosen = np.concatenate([order[:, :smallest], order[:, groups.shape[1] - (count - smallest) :]], axis=1)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, chosen, True, axis=1)
    return mask
