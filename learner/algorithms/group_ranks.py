"""The best and the worst images of each group, as pure functions of rewards."""

import numpy as np
from jaxtyping import Float

from ray_ddpo.learner.algorithms.selection import best


def best_of_groups(rewards: Float[np.ndarray, "N"], images_per_prompt: int, count: int) -> Float[np.ndarray, "N"]:
    """Return 1 for the `count` best images of each group, and 0 for the others.

    Of equal rewards the first image counts as better. A group with equal rewards has no best image.

    Args:
        rewards: one per image. The images of a group are neighbors.
    """
    groups = rewards.astype(np.float64).reshape(-1, images_per_prompt)
    return np.where(_differ(groups), best(groups, count), 0.0).ravel()


def best_and_worst(rewards: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
    """Return 1 for the best image of each group, −1 for the worst, and 0 for the others (flow_grpo, `dpo`).

    Of equal rewards the first image is taken. A group with equal rewards makes no pair.

    Args:
        rewards: one per image. The images of a group are neighbors.
    """
    groups = rewards.astype(np.float64).reshape(-1, images_per_prompt)
    signs = np.zeros_like(groups)
    np.put_along_axis(signs, groups.argmax(axis=1)[:, None], 1.0, axis=1)
    np.put_along_axis(signs, groups.argmin(axis=1)[:, None], -1.0, axis=1)
    return np.where(_differ(groups), signs, 0.0).ravel()


def _differ(groups: Float[np.ndarray, "G N"]) -> np.ndarray:
    return (groups != groups[:, :1]).any(axis=1, keepdims=True)
