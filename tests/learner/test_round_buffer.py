"""The round buffer: advantages in task order from weighted rewards, statistics that last, metrics by hand."""

import numpy as np
import pytest

from common.prompts import Prompt
from common.schedule import Task
from common.trajectory import Rollout, Scores, TaskReport
from learner.algorithms.algorithm import AdvantageSettings
from learner.algorithms.ddpo_is import DDPOImportanceSampling
from learner.round_buffer import RoundBuffer
from tests.reference.ddpo_reference import PerPromptTracker


def rollout(index: int, prompts: list[str], round: int = 0, **rewards: list[float]) -> Rollout:
    task = Task(round, index, 0, tuple(Prompt(text) for text in prompts), tuple(range(len(prompts))))
    scores = Scores({name: np.array(values, np.float32) for name, values in rewards.items()}, 1.0)
    return Rollout(TaskReport(task, "f", 1, 1, 1.0), scores, None, None)


def buffer(weights: dict[str, float], **settings: object) -> RoundBuffer:
    return RoundBuffer(DDPOImportanceSampling(advantages=AdvantageSettings(**settings)), weights)


def test_advantages_stand_in_task_order() -> None:
    batch, _ = buffer({"a": 1.0}, kind="round").train_batch(
        [rollout(0, ["cat", "dog"], a=[1, 2]), rollout(1, ["cow", "hen"], a=[3, 4])]
    )
    deviation = (5 / 4) ** 0.5  # of 1, 2, 3, 4
    assert batch.advantages == pytest.approx(np.array([-1.5, -0.5, 0.5, 1.5]) / deviation)
    assert [report.task.index for report in batch.reports] == [0, 1] and batch.round == 0


def test_several_rewards_are_summed_by_their_weights() -> None:
    _, metrics = buffer({"a": 2.0, "b": -0.5}, kind="round").train_batch([rollout(0, ["x", "y"], a=[1, 2], b=[4, 0])])
    # 2 · 1 − 0.5 · 4 = 0 and 2 · 2 − 0 = 4
    assert metrics["reward/mean"] == 2 and metrics["reward/std"] == 2
    assert metrics["reward/a/mean"] == 1.5 and metrics["reward/b/mean"] == 2


def test_metrics_by_hand() -> None:
    _, metrics = buffer({"a": 1.0}, min_count=1).train_batch(
        [rollout(0, ["cat", "dog"], a=[1, 5]), rollout(1, ["cat", "cat"], a=[2, 3])]
    )
    assert metrics["images"] == 4 and metrics["reward/mean"] == 2.75
    assert metrics["reward/prompt/cat"] == 2 and metrics["reward/prompt/dog"] == 5
    # cats −1, 0 and 1 by a deviation of √(2/3); the lone dog 0
    assert metrics["advantage/std"] == pytest.approx(((1.5 + 1.5) / 4) ** 0.5, rel=1e-5)


def test_statistics_last_over_rounds_as_in_the_reference() -> None:
    ours, tracker = buffer({"a": 1.0}, buffer_size=5, min_count=3), PerPromptTracker(5, 3)
    generator = np.random.default_rng(0)
    for round in range(4):
        prompts = generator.choice(["cat", "dog", "cow"], 6).tolist()
        rewards = generator.normal(size=6).astype(np.float32).tolist()
        halves = [rollout(half, prompts[3 * half :][:3], round, a=rewards[3 * half :][:3]) for half in (0, 1)]
        batch, _ = ours.train_batch(halves)
        assert batch.advantages == pytest.approx(tracker.update(prompts, rewards), rel=1e-5, abs=1e-6)
    assert ours.statistics == {prompt: tuple(ring) for prompt, ring in tracker.rings.items()}


def test_a_buffer_with_its_statistics_given_back_goes_on_as_before() -> None:
    first, second = buffer({"a": 1.0}, min_count=2), buffer({"a": 1.0}, min_count=2)
    first.train_batch([rollout(0, ["cat", "cat"], a=[1, 2])])
    second.statistics = first.statistics
    after = [rollout(0, ["cat", "dog"], round=1, a=[5, 6])]
    assert first.train_batch(after)[0].advantages.tolist() == second.train_batch(after)[0].advantages.tolist()


def test_tasks_out_of_order_or_of_two_rounds_are_our_own_error() -> None:
    in_order = [rollout(0, ["cat"], a=[1]), rollout(1, ["dog"], a=[2])]
    with pytest.raises(AssertionError, match="in task order"):
        buffer({"a": 1.0}).train_batch(in_order[::-1])
    with pytest.raises(AssertionError, match="of one round"):
        buffer({"a": 1.0}).train_batch([in_order[0], rollout(1, ["dog"], round=1, a=[2])])
