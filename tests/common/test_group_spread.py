"""Groups without spread, the tasks that refill a round, and the groups that it trains on: by hand."""

import numpy as np
import pytest

from ray_ddpo.common.group_spread import Refill, groups_with_spread, trained_groups
from ray_ddpo.common.prompts import Animals, Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport

NAN = float("nan")


def rollouts_of(size: int, **rewards: list[float]) -> list[Rollout]:
    """Return the rollouts of tasks of `size` images with these rewards, image by image."""
    count = len(next(iter(rewards.values())))
    found = []
    for index, first in enumerate(range(0, count, size)):
        task = Task(0, index, 0, (Prompt("cat"),) * size, tuple(range(first, first + size)))
        scores = {name: np.array(values[first : first + size], np.float32) for name, values in rewards.items()}
        report = TaskReport(task, "", 0, 0, 0.0)
        found.append(Rollout(report, Scores(scores, 0.0), None, None))
    return found


def test_a_group_has_spread_if_one_of_its_trained_rewards_differs() -> None:
    rollouts = rollouts_of(2, a=[1, 1, 1, 1, 1, 2, 0, NAN], b=[3, 3, 3, 4, 3, 3, 0, 0], c=[1, 2, 3, 4, 5, 6, 7, 8])
    assert groups_with_spread(rollouts, ("a",), 2).tolist() == [False, False, True, True]
    assert groups_with_spread(rollouts, ("a", "b"), 2).tolist() == [False, True, True, True]
    assert groups_with_spread(rollouts, ("a", "b"), 4).tolist() == [True, True]


def test_of_a_reward_without_weight_only_the_distance_below_its_floor_counts(tables: dict) -> None:
    tables["prompts"] |= {"images_per_prompt": 2}
    table = {"name": "brightness", "label": "b", "weight": 0}
    tables["rewards"] = [{"name": "sharpness", "label": "a"}, table | {"floor": 5.0}, table | {"label": "c"}]
    tables.pop("reward")
    refill = Refill.of(Recipe.parse(tables), 1)
    above, below, both, unscored = [6, 7], [5, 4.5], [3, 2], [6, NAN]
    rollouts = rollouts_of(2, a=[1] * 8, b=[*above, *below, *both, *unscored], c=[1, 2, 3, 4, 5, 6, 7, 8])
    assert refill.with_spread(rollouts).tolist() == [False, True, True, True]


def test_a_round_trains_on_its_first_groups_with_spread() -> None:
    with_spread = np.array([True, False, True, True, False, True])
    assert trained_groups(with_spread, 2).tolist() == [True, False, True, False, False, False]
    assert trained_groups(with_spread, 9).tolist() == with_spread.tolist()


@pytest.mark.parametrize(
    ("group", "size", "lacking", "tasks"),
    [
        (2, 4, 1, 1),  # a task has two groups
        (2, 4, 2, 1),
        (2, 4, 3, 2),
        (8, 4, 1, 2),  # a group has two tasks
        (4, 6, 1, 2),  # two tasks have three groups
        (4, 6, 3, 2),
        (4, 6, 4, 4),
        (4, 6, 0, 0),
    ],
)
def test_the_fewest_tasks_with_complete_groups_follow(group: int, size: int, lacking: int, tasks: int) -> None:
    groups = 12
    rewards = [float(number % 2) for number in range(group * (groups - lacking))] + [0.0] * (group * lacking)
    rollouts = rollouts_of(size, a=rewards)
    refill = Refill(attempts=1, rewards=("a",), images_per_prompt=group, batch_size=size, groups=groups)
    first = len(rollouts)
    assert refill.further_tasks(rollouts) == range(first, first + tasks)


def test_images_of_surplus_groups_and_of_groups_without_spread_are_left_out() -> None:
    rollouts = rollouts_of(2, a=[0, 0, 0, 1, 0, 1, 2, 3])
    refill = Refill(attempts=1, rewards=("a",), images_per_prompt=2, batch_size=2, groups=2)
    assert refill.trained_images(rollouts).tolist() == [False, False, True, True, True, True, False, False]


def test_further_tasks_continue_the_rounds_sequence(tables: dict) -> None:
    tables["prompts"] |= {"images_per_prompt": 4}
    recipe, sample = Recipe.parse(tables), Animals().load()
    usual = round_tasks(recipe, 3, sample)
    assert [task.index for task in usual] == [0, 1]
    first, then = round_tasks(recipe, 3, sample, range(2, 4)), round_tasks(recipe, 3, sample, range(3, 4))
    assert [task.index for task in first] == [2, 3] and then == first[1:]
    longer = Recipe.parse({**tables, "sampling": {**tables["sampling"], "batches_per_round": 4}})
    assert round_tasks(longer, 3, sample) == [*usual, *first]
    seeds = [seed for task in (*usual, *first) for seed in task.seeds]
    assert len(set(seeds)) == len(seeds)


def test_further_tasks_share_the_prefix_of_their_group(tables: dict) -> None:
    tables["prompts"] |= {"images_per_prompt": 8}
    tables["sampling"] |= {"shared_prefix": True, "sde_window": 1, "batches_per_round": 4}
    recipe, sample = Recipe.parse(tables), Animals().load()
    whole = round_tasks(recipe, 0, sample, range(4, 8))
    assert [task.prefix_seeds for task in whole] == [(whole[0].seeds[0],) * 4] * 2 + [(whole[2].seeds[0],) * 4] * 2
    assert round_tasks(recipe, 0, sample, range(5, 6)) == whole[1:2]
