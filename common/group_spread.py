"""Groups whose rewards have no spread, and the tasks that refill a round with further groups (dynamic sampling).

DAPO (arXiv 2503.14476, section 3.2) samples further groups until a batch is full of groups with different rewards. A
round here continues the sequence of its own tasks: prompts and seeds are functions of the run's seed, the round and the
group's number. How many tasks follow is a function of the rewards before, so bits depend on nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import Rollout


def groups_with_spread(
    rollouts: list[Rollout], rewards: Sequence[str], images_per_prompt: int, floors: Mapping[str, float] | None = None
) -> Bool[np.ndarray, "G"]:
    """Return the mask of groups that teach: some reward differs within them. In task order.

    A group with an image that could not be scored counts as one with spread, because it is dropped and not replaced.

    Args:
        rewards: the names of the rewards that are trained on.
        images_per_prompt: images of a group.
        floors: of further rewards, of which only the distance below the floor is trained on.
    """

    def column_of(name: str) -> np.ndarray:
        return np.concatenate([rollout.scores.rewards[name] for rollout in rollouts])

    columns = [column_of(name) for name in rewards]
    columns += [np.maximum(0.0, floor - column_of(name)) for name, floor in (floors or {}).items()]
    found = np.zeros(len(columns[0]) // images_per_prompt, bool)
    for column in columns:
        groups = column.reshape(-1, images_per_prompt)
        found |= (groups != groups[:, :1]).any(axis=1)  # NaN differs from itself
    return found


def trained_groups(with_spread: Bool[np.ndarray, "G"], count: int) -> Bool[np.ndarray, "G"]:
    """Return the mask of the first `count` groups with spread, which a round trains on."""
    return with_spread & (np.cumsum(with_spread) <= count)


@dataclass(frozen=True)
class Refill:
    """How a round is refilled: up to `attempts` times, with as many further groups as it lacks.

    Tasks have `batch_size` images, so the fewest tasks with complete groups are sampled at a time. Groups beyond those
    that a round trains on are left out.
    """

    attempts: int
    rewards: tuple[str, ...]  # that are trained on
    images_per_prompt: int
    batch_size: int  # images per task
    groups: int  # that a round trains on
    floors: Mapping[str, float] = field(default_factory=dict)  # of rewards without weight

    @classmethod
    def of(cls, recipe: Recipe, attempts: int) -> "Refill":
        """Return how the rounds of a recipe are refilled."""
        trained = tuple(table.called for table in recipe.all_rewards if table.weight)
        unweighted = [table for table in recipe.all_rewards if not table.weight]
        floors = {table.called: table.floor for table in unweighted if table.floor is not None}
        group = recipe.prompts.images_per_prompt
        return cls(attempts, trained, group, recipe.sampling.batch_size, recipe.images_per_round // group, floors)

    def with_spread(self, rollouts: list[Rollout]) -> Bool[np.ndarray, "G"]:
        """Return the mask of groups that teach. In task order."""
        return groups_with_spread(rollouts, self.rewards, self.images_per_prompt, self.floors)

    def further_tasks(self, rollouts: list[Rollout]) -> range:
        """Return the indices of the tasks to sample next, after those of `rollouts`; empty if the round is full."""
        lacking = self.groups - int(self.with_spread(rollouts).sum())
        images = math.lcm(self.images_per_prompt, self.batch_size)  # of the fewest tasks with complete groups
        tasks = -(-max(0, lacking) // (images // self.images_per_prompt)) * (images // self.batch_size)
        return range(len(rollouts), len(rollouts) + tasks)

    def trained_images(self, rollouts: list[Rollout]) -> Bool[np.ndarray, "N"]:
        """Return the mask of the images that the round trains on: those of its first groups with spread."""
        return trained_groups(self.with_spread(rollouts), self.groups).repeat(self.images_per_prompt)
