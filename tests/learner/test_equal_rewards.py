"""Equal rewards have advantages of exactly 0, and then neither momentum nor weight decay changes the weights."""

import dataclasses

import numpy as np
import pytest

from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.advantages import (
    extend_statistics,
    group_advantages,
    per_prompt_advantages,
    round_advantages,
)
from tests.rounds import SampledRound, components_with, learner_of, sample_round


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e9 / 7, 0.0])
def test_equal_rewards_have_advantages_of_exactly_0_despite_rounding(value: float) -> None:
    rewards, prompts = np.full(6, value), ["cat", "cat", "dog", "dog", "dog", "dog"]
    statistics = extend_statistics({}, prompts, rewards, 32)
    for advantages in (
        round_advantages(rewards),
        group_advantages(rewards, 3, "group"),
        group_advantages(rewards, 3, "round"),
        per_prompt_advantages(statistics, prompts, rewards, 3),
    ):
        assert advantages.tolist() == [0] * 6


def test_only_the_group_without_spread_has_advantages_of_0() -> None:
    advantages = group_advantages(np.array([0.1, 0.1, 0.1, 1.0, 2.0, 3.0]), 3, "round")
    assert advantages[:3].tolist() == [0] * 3 and np.all(advantages[[3, 5]] != 0)


def with_advantage(sampled: SampledRound, advantage: float) -> SampledRound:
    advantages = np.full(len(sampled.batch.advantages), advantage)
    return SampledRound(dataclasses.replace(sampled.batch, advantages=advantages), sampled.trajectories)


def second_round(components: Components, advantage: float) -> tuple[dict[str, float], bool]:
    """Train on an ordinary round, then on one with equal advantages. Return its metrics, and if weights changed."""
    learner = learner_of(components)
    first = sample_round(components, learner.weights()[-1])
    learner.update(first.batch, *first.trajectories)
    before = learner.state()
    second = with_advantage(sample_round(components, learner.weights()[-1], 1), advantage)
    metrics, after = learner.update(second.batch, *second.trajectories)
    same = after.trained.fingerprint == before.trained.fingerprint
    moments = all(np.array_equal(after.optimizer[name], before.optimizer[name]) for name in before.optimizer)
    assert same == moments
    return metrics, not same


def test_with_advantages_of_0_no_optimizer_step_is_made(tables: dict) -> None:
    metrics, moved = second_round(components_with(tables, learner__weight_decay=0.1), 0.0)
    assert not moved
    assert metrics["optimizer_steps"] == metrics["optimizer_steps_skipped"] == 2 and metrics["ratio/max"] > 0


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("algorithm", "advantage"),
    [({"name": "ddpo_is", "kl_coef": 0.1}, 0.0), ({"name": "rwr"}, 1.0)],
    ids=["a KL to the pretrained model", "weights instead of advantages"],
)
def test_equal_advantages_with_a_gradient_are_trained_on(tables: dict, algorithm: dict, advantage: float) -> None:
    metrics, moved = second_round(
        components_with({**tables, "algorithm": algorithm}, learner__micro_batch_size=4), advantage
    )
    assert moved and metrics["optimizer_steps_skipped"] == 0
