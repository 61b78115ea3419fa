"""The serial stream: rounds in task order, each task sampled with its version."""

import numpy as np
import pytest
import torch

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.jpeg import jpeg_kilobytes
from ray_ddpo.actors.rollouts.stream import SerialPool, SerialRolloutStream, StreamSettings
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.recipe.reward_pools import reward_pools
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.common.trajectory import Rollout
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.learner import Learner
from tests.rounds import components_with, moved


@pytest.fixture
def components(tables: dict) -> Components:
    return components_with(tables, max_policy_lag=1, sampling__batch_size=2, sampling__batches_per_round=2)


def stream_of(components: Components) -> SerialRolloutStream:
    recipe = components.recipe
    pools = tuple(
        SerialPool(RewardWorker(components.rewards_of(pool), pool.table, recipe.runtime), pool.table)
        for pool in reward_pools(recipe)
    )
    settings = StreamSettings(recipe.runtime, 4.0, lambda: None)
    return SerialRolloutStream(Sampler(components.policy, recipe.sampling, recipe.runtime), pools, settings)


def versions(components: Components, count: int) -> list[PolicyWeights]:
    first = Learner(components.policy, components.algorithm, components.recipe).weights()[-1]
    return [pack(version, moved(first, seed=version).arrays()) for version in range(count)]


def collected(stream: SerialRolloutStream, round_index: int) -> list[Rollout]:
    return stream.collect(round_index, range(2))


def tasks_of(components: Components, round_index: int) -> list[Task]:
    return round_tasks(components.recipe, round_index, components.prompts.load())


def test_a_round_is_returned_in_task_order_with_scores_and_images(components: Components) -> None:
    stream, weights = stream_of(components), versions(components, 1)
    stream.submit(tasks_of(components, 0), weights[0])
    rollouts = collected(stream, 0)
    assert [rollout.report.task for rollout in rollouts] == tasks_of(components, 0)
    for rollout in rollouts:
        assert rollout.report.fingerprint == weights[0].fingerprint
        scores = rollout.scores.rewards["jpeg_compressibility"]
        assert np.array_equal(scores, -jpeg_kilobytes(rollout.images.pixels))


def test_tasks_are_sampled_with_their_version_even_if_newer_tasks_are_queued(components: Components) -> None:
    stream, weights = stream_of(components), versions(components, 2)
    stream.submit(tasks_of(components, 0), weights[0])
    stream.submit(tasks_of(components, 1), weights[0])
    collected(stream, 0)
    stream.submit(tasks_of(components, 2), weights[1])
    assert {rollout.report.fingerprint for rollout in collected(stream, 1)} == {weights[0].fingerprint}
    assert {rollout.report.fingerprint for rollout in collected(stream, 2)} == {weights[1].fingerprint}


def test_the_round_is_the_same_whatever_was_sampled_before_it(components: Components) -> None:
    weights = versions(components, 1)
    paths = []
    for rounds in ([1], [0, 1]):
        stream = stream_of(components)
        for round_index in rounds:
            stream.submit(tasks_of(components, round_index), weights[0])
        paths.append([collected(stream, round_index) for round_index in rounds][-1][1].trajectory.next_latents)
    assert torch.equal(paths[0], paths[1])
