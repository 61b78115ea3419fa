"""Weights go from the learner to each node once, never into the driver's heap, and outlive the learner's node."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.broadcast import stored_bytes
from ray_ddpo.actors.rollouts.ray_stream import Pools, RayRolloutStream
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool
from ray_ddpo.actors.rollouts.stream import StreamSettings
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.policy_weights import PolicyWeights, averaged, pack, verified
from ray_ddpo.common.process_deaths import Death
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import ImageBatch, Scores, TaskReport, TrainBatch
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup
from tests.system.nodes import local_nodes

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
NODES, SAMPLERS_PER_NODE, NUMBERS = 2, 2, 2_500_000
STATE = 3  # a state's size over that of its weights


class Reader:
    """A sampler that reads every number of its weights, and a reward worker."""

    def ready(self) -> bool:
        return True

    def forget(self, place: Place) -> None:
        """Every task is sampled."""

    def sample(self, task: Task, weights: PolicyWeights) -> tuple[TaskReport, None, ImageBatch]:
        pixels = np.full((len(task.seeds), 2, 2, 3), float(weights.buffer.mean()), np.uint8)
        return TaskReport(task, weights.fingerprint, 1, 0, 0.1), None, ImageBatch(pixels, task.prompts)

    def score(self, images: ImageBatch, first: int, last: int) -> Scores:
        return Scores({"nothing": np.zeros(last - first, np.float32)}, 0.0)


class Trainer:
    """A learner whose weights and optimizer state are a function of the version, so that wrong ones are noticed."""

    def __init__(self) -> None:
        self._state = state_of(0)

    def ready(self) -> bool:
        return True

    def state(self) -> LearnerState:
        return self._state

    def load_state(self, state: LearnerState, *weights: PolicyWeights) -> None:
        assert verified(weights[-1]).policy_version == state.policy_version
        for name, array in state_of(state.policy_version).optimizer.items():
            assert np.array_equal(array, state.optimizer[name])
        self._state = dataclasses.replace(state, weights=weights)

    def lead(self, batch: TrainBatch) -> tuple[dict[str, float], PolicyWeights, LearnerState]:
        self._state = state_of(self._state.policy_version + 1)
        return {}, self._state.weights[-1], dataclasses.replace(self._state, weights=())


def version_of(version: int) -> PolicyWeights:
    return pack(version, {"network": np.full(NUMBERS, 10 * version + 10, np.float32)})


def state_of(version: int) -> LearnerState:
    optimizer = {f"network/{key}": np.full(NUMBERS, version, np.float32) for key in ("exp_avg", "exp_avg_sq")}
    return LearnerState(version, (version_of(version),), optimizer, {})


def tasks(version: int, count: int, stream: Stream, first: int = 0) -> list[Task]:
    return [Task(version, first + index, version, (Prompt("x"),), (index,), stream=stream) for index in range(count)]


def started(remote: Any, count: int) -> tuple[RayRolloutStream, Pools]:
    budget, here = RestartBudget(9), remote.options(resources={"learner": 0.1}, num_cpus=0)
    samplers = WorkerPool("sampler", "sampler", lambda number: remote.remote(), count, budget)
    workers = WorkerPool("reward_worker", "reward_worker", lambda number: here.remote(), 1, budget)
    pools = Pools(samplers, (ScoringPool(workers, ("nothing",), RewardPoolTable(), independent=False),), budget)
    stream = RayRolloutStream(pools, StreamSettings(RuntimeTable(), 100.0, check=lambda: None))
    stream.wait_until_loaded({"sampler": count, "reward_worker": 1})
    return stream, pools


@contextmanager
def learner_beside(stream: RayRolloutStream, deaths: list[Death]) -> Iterator[RayLearnerGroup]:
    remote = ray.remote(resources={"learner": 0.1}, num_cpus=0)(Trainer)
    make = lambda: [remote.remote()]  # noqa: E731
    group = RayLearnerGroup(make(), make, stream.keep_busy_until_ready, deaths.append, 0)
    group.wait_until_loaded()
    yield group
    group.close()


def run_beside(mode: str) -> str:
    """Run this module in a process of its own, because other tests of this process may use another cluster."""
    command = [sys.executable, "-m", "tests.system.test_broadcast", mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_version_goes_to_each_node_once_and_its_evaluation_brings_no_second_copy() -> None:
    assert run_beside("copies").count("copies a node") == 3


def test_weights_and_state_of_the_last_round_outlive_the_learners_node() -> None:
    assert "resumed from version 1" in run_beside("node")


def main(mode: str) -> None:
    """Start a cluster, and check copies and heap, or the death of the learner's node."""
    with local_nodes() as cluster:
        learners = cluster.add_node(num_cpus=0, resources={"learner": 1}, object_store_memory=200_000_000)
        for _ in range(NODES):
            cluster.add_node(num_cpus=SAMPLERS_PER_NODE, object_store_memory=300_000_000)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=1, concurrency_groups={"health": 1})(Reader)
            deaths: list[Death] = []
            stream, pools = started(remote, NODES * SAMPLERS_PER_NODE)
            with learner_beside(stream, deaths) as learner:
                if mode == "copies":
                    count_copies(stream, learner)
                else:
                    learner.update(TrainBatch(0, (), np.zeros(0)), [])
                    cluster.remove_node(learners, allow_graceful=False)
                    cluster.add_node(num_cpus=0, resources={"learner": 1}, object_store_memory=200_000_000)
                    resume_elsewhere(stream, learner, deaths)
            for pool in pools.all:
                pool.close()
        finally:
            ray.shutdown()


def count_copies(stream: RayRolloutStream, learner: RayLearnerGroup) -> None:
    """Count the bytes that every node's store takes in, and those that the driver's heap grows by."""
    average = version_of(0)
    for version in range(1, 4):
        before, heap = stored_bytes(), heap_bytes()
        _, state = learner.update(TrainBatch(version - 1, (), np.zeros(0)), [])
        weights = state.weights[-1]
        stream.submit(tasks(version, 12, Stream.TRAINING), weights)
        stream.submit(tasks(version, 4, Stream.EVALUATION), weights)
        sampled = stream.collect(version, range(12)) + stream.collect(version, range(4), Stream.EVALUATION)
        assert {rollout.report.fingerprint for rollout in sampled} == {weights.fingerprint}
        copies, grown = sorted(copied(before, weights)), (heap_bytes() - heap) / weights.buffer.nbytes
        average = averaged(average, weights, 0.5)
        stream.submit(tasks(version, 8, Stream.EVALUATION, first=4), average)
        of_average = stream.collect(version, range(4, 12), Stream.EVALUATION)
        assert {rollout.report.fingerprint for rollout in of_average} == {average.fingerprint}
        with_average = sorted(copied(before, weights))
        print(f"version {version}: {copies} copies a node, with its average {with_average}; heap {grown:+.2f}")
        # The learner's node writes the state and the driver's node maps it. Each sampler's node fetches the weights.
        assert copies == pytest.approx([1, 1, STATE, STATE], abs=0.01)
        assert with_average == pytest.approx([2, 2, STATE, STATE + 1], abs=0.01)
        assert grown < 0.5, "the driver maps the state and does not copy it"


def resume_elsewhere(stream: RayRolloutStream, learner: RayLearnerGroup, deaths: list[Death]) -> None:
    """Sample with the weights of the lost node, and train on from its state."""
    weights = learner.weights()[-1]
    stream.wait_until_loaded({"reward_worker": 1})
    stream.submit(tasks(1, 8, Stream.TRAINING), weights)
    assert {rollout.report.fingerprint for rollout in stream.collect(1, range(8))} == {version_of(1).fingerprint}
    _, state = learner.update(TrainBatch(1, (), np.zeros(0)), [])
    assert len(deaths) == 1 and state.trained.fingerprint == version_of(2).fingerprint
    print("resumed from version 1")


def heap_bytes() -> int:
    """Return this process's anonymous memory, without pages shared with the object store."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def copied(before: dict[str, int], weights: PolicyWeights) -> list[float]:
    """Return how often the weights fit into the bytes that each node has taken in since."""
    return [(taken - before[node]) / weights.buffer.nbytes for node, taken in stored_bytes().items()]


if __name__ == "__main__":
    main(sys.argv[1])
