"""Statistics of rewards within groups: how many groups teach something, and how many images are as good as can be."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

NEAR_BEST = 0.01  # of the range of possible rewards: a probability is never exactly 1


@dataclass(frozen=True)
class RewardRange:
    """The lowest and the highest possible reward."""

    lowest: float
    highest: float

    def is_best(self, rewards: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Return which rewards are within 1 % of the range of the highest possible one. NaN is not."""
        return rewards >= self.highest - NEAR_BEST * (self.highest - self.lowest)


def weighted_range(
    ranges: Mapping[str, tuple[float, float] | None], weights: Mapping[str, float]
) -> RewardRange | None:
    """Return the range of the weighted sum of rewards; None if one of them is unbounded.

    Args:
        ranges: the lowest and highest score of each reward; None if it has no bound.
        weights: of each reward. With a negative weight, its lowest score is the best one.
    """
    ends = []
    for name, weight in weights.items():
        found = ranges[name]
        if weight == 0:
            continue
        if found is None:
            return None
        ends.append(sorted(weight * end for end in found))
    if not ends:
        return None
    lowest, highest = np.sum(ends, axis=0).tolist()
    return RewardRange(lowest, highest)


def saturation(rewards: Float[np.ndarray, "N"], possible: RewardRange) -> float:
    """Return the share of the finite rewards that are the best possible; NaN if none is finite."""
    finite = rewards[np.isfinite(rewards)]
    return float(possible.is_best(finite).mean()) if len(finite) else float("nan")


def group_metrics(
    rewards: Float[np.ndarray, "N"], images_per_prompt: int, possible: RewardRange | None
) -> dict[str, float]:
    """Return the metrics of a round's groups.

    Args:
        rewards: of all images of whole groups, in task order.
        images_per_prompt: the group size. With 1, the round counts as one group.
        possible: the range of possible rewards, if they are bounded.

    Returns:
        `zero_std_groups`: the share of groups whose images all have the same reward. `group_std`: the mean over groups
        of the standard deviation within a group. `saturation`: the share of images with the best possible reward, or,
        if rewards have no bound, with the best reward of their group.
    """
    groups = rewards.reshape(-1, images_per_prompt if images_per_prompt > 1 else len(rewards))
    best = possible.is_best(rewards) if possible else groups == groups.max(axis=1, keepdims=True)
    return {
        "reward/zero_std_groups": float((groups == groups[:, :1]).all(axis=1).mean()),
        "reward/group_std": float(groups.std(axis=1).mean()),
        "reward/saturation": float(best.mean()),
    }
