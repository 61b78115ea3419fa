"""Training tasks are sampled before evaluation tasks, on the real stream with sleeping actors."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from ray_ddpo.actors.rollouts.ray_stream import Pools, RayRolloutStream
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool
from ray_ddpo.actors.rollouts.stream import StreamSettings
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Stream, Task
from ray_ddpo.common.trajectory import ImageBatch, Scores, TaskReport

pytestmark = pytest.mark.thorough

SECONDS = 0.3  # a task
WEIGHTS = pack(0, {"a": np.zeros(1)})


class Sleeper:
    """Draws and scores by waiting."""

    def ready(self) -> bool:
        return True

    def sample(self, task: Task, weights: PolicyWeights) -> tuple[TaskReport, None, ImageBatch]:
        time.sleep(SECONDS)
        pixels = np.zeros((len(task.seeds), 2, 2, 3), np.uint8)
        return TaskReport(task, weights.fingerprint, 1, 0, SECONDS), None, ImageBatch(pixels, task.prompts)

    def score(self, images: ImageBatch, first: int, last: int) -> Scores:
        return Scores({"nothing": np.zeros(last - first, np.float32)}, 0.0)


def tasks(round_index: int, count: int, stream: Stream) -> list[Task]:
    return [Task(round_index, index, 0, (Prompt("x"),), (index,), stream=stream) for index in range(count)]


@pytest.fixture
def stream(cluster: None) -> Iterator[RayRolloutStream]:
    """One sampler and one reward worker."""
    remote, budget = ray.remote(num_cpus=0.01)(Sleeper), RestartBudget(0)
    samplers, workers = (
        WorkerPool(name, name, lambda number: remote.remote(), 1, budget) for name in ("sampler", "reward_worker")
    )
    pools = Pools(samplers, (ScoringPool(workers, ("nothing",), RewardPoolTable(), independent=False),), budget)
    stream = RayRolloutStream(pools, StreamSettings(RuntimeTable(), 100.0, check=lambda: None))
    stream.wait_until_loaded({"sampler": 1, "reward_worker": 1})
    yield stream
    for pool in pools.all:
        pool.close()


def sampled_in_order(stream: RayRolloutStream, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A list that grows with every task whose sampling is over."""
    order: list[tuple[str, int]] = []
    finished: Any = stream._sampling.finished

    def noted(report: Any, now: float) -> Any:
        sampled = finished(report, now)
        if sampled is not None:
            order.append((sampled.report.task.stream.name, sampled.report.task.round))
        return sampled

    monkeypatch.setattr(stream._sampling, "finished", noted)
    return order


def test_a_round_waits_for_one_task_of_an_evaluation_at_most(
    stream: RayRolloutStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = sampled_in_order(stream, monkeypatch)
    stream.submit(tasks(1, 4, Stream.EVALUATION), WEIGHTS)  # nothing else to do: the sampler begins with them
    stream.submit(tasks(1, 3, Stream.TRAINING), WEIGHTS)
    stream.submit(tasks(2, 2, Stream.TRAINING), WEIGHTS)
    stream.collect(1, range(3))
    assert order[:4] == [("EVALUATION", 1), *[("TRAINING", 1)] * 3]
    stream.collect(1, range(4), Stream.EVALUATION)
    stream.collect(2, range(2))
    # The evaluation belongs to round 1: it comes before round 2, so that a busy sampler does not put it off for ever.
    assert order[4:] == [*[("EVALUATION", 1)] * 3, *[("TRAINING", 2)] * 2]
