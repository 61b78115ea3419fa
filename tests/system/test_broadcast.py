"""Weights of a version travel once to each node, for any number of samplers and tasks."""

import subprocess
import sys
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
from ray_ddpo.common.policy_weights import PolicyWeights, averaged, pack
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import ImageBatch, Scores, TaskReport
from tests.system.nodes import local_nodes

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
NODES, SAMPLERS_PER_NODE, NUMBERS = 2, 2, 5_000_000


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


def version_of(version: int) -> PolicyWeights:
    return pack(version, {"network": np.full(NUMBERS, 10 * version + 10, np.float32)})


def tasks(version: int, count: int, stream: Stream, first: int = 0) -> list[Task]:
    return [Task(version, first + index, version, (Prompt("x"),), (index,), stream=stream) for index in range(count)]


def started(remote: Any, count: int) -> tuple[RayRolloutStream, Pools]:
    budget, here = RestartBudget(0), remote.options(resources={"driver": 0.1}, num_cpus=0)
    samplers = WorkerPool("sampler", "sampler", lambda number: remote.remote(), count, budget)
    workers = WorkerPool("reward_worker", "reward_worker", lambda number: here.remote(), 1, budget)
    pools = Pools(samplers, (ScoringPool(workers, ("nothing",), RewardPoolTable(), independent=False),), budget)
    stream = RayRolloutStream(pools, StreamSettings(RuntimeTable(), 1, 100.0, check=lambda: None))
    stream.wait_until_loaded({"sampler": count, "reward_worker": 1})
    return stream, pools


def test_a_version_travels_once_to_each_node_and_its_evaluation_brings_no_second_copy() -> None:
    """In a process of its own: other tests of this one may be on another cluster."""
    command = [sys.executable, "-m", "tests.system.test_broadcast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("copies a node") == 3


def main() -> None:
    """Count what every node's store takes in, and hold it against one copy."""
    with local_nodes() as cluster:
        cluster.add_node(num_cpus=0, resources={"driver": 1}, object_store_memory=100_000_000)
        for _ in range(NODES):
            cluster.add_node(num_cpus=SAMPLERS_PER_NODE, object_store_memory=300_000_000)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=1, concurrency_groups={"health": 1})(Reader)
            stream, pools = started(remote, NODES * SAMPLERS_PER_NODE)
            average = version_of(0)
            for version in range(3):
                weights = version_of(version)
                average = averaged(average, weights, 0.5)
                before = stored_bytes()
                stream.publish(weights)
                stream.submit(tasks(version, 12, Stream.TRAINING))
                stream.submit(tasks(version, 4, Stream.EVALUATION), weights)
                sampled = stream.collect(version, range(12)) + stream.collect(version, range(4), Stream.EVALUATION)
                assert {rollout.report.fingerprint for rollout in sampled} == {weights.fingerprint}
                copies = sorted(copied(before, weights))
                stream.submit(tasks(version, 8, Stream.EVALUATION, first=4), average)
                of_average = stream.collect(version, range(4, 12), Stream.EVALUATION)
                assert {rollout.report.fingerprint for rollout in of_average} == {average.fingerprint}
                with_average = sorted(copied(before, weights))
                print(f"version {version}: {copies} copies a node, with its average {with_average}")
                # The driver's node and the samplers' hold one copy each, that of the reward worker none.
                assert copies == pytest.approx([0, 1, 1, 1], abs=0.01)
                assert with_average == pytest.approx([0, *[2 if version else 1] * 3], abs=0.01)
            for pool in pools.all:
                pool.close()
        finally:
            ray.shutdown()


def copied(before: dict[str, int], weights: PolicyWeights) -> list[float]:
    """How often the weights fit into what each node has taken in since."""
    return [(taken - before[node]) / weights.buffer.nbytes for node, taken in stored_bytes().items()]


if __name__ == "__main__":
    main()
