"""RolloutStream: tasks in, scored rollouts out; the interface, and the same in one process."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rollouts.inquiry import Control
from ray_ddpo.actors.rollouts.scoring_job import ScoringJob
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.metrics.round_metrics import StreamReport
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import ImageBatch, Rollout, Scores, TaskReport, merged_scores

# Called between any two steps of work, at least about once a second: to stop a run it raises.
Check = Callable[[], None]


class RolloutStream(ABC):
    """Draws and scores tasks. A round comes back whole and in task order, whoever was first."""

    @abstractmethod
    def publish(self, weights: PolicyWeights) -> None:
        """Make a policy version available to tasks."""

    @abstractmethod
    def submit(self, tasks: list[Task], weights: PolicyWeights | None = None) -> None:
        """Queue tasks. Their policy version must have been published, or they come with its weights."""

    @abstractmethod
    def collect(self, round_index: int, tasks: range, stream: Stream = Stream.TRAINING) -> list[Rollout]:
        """The rollouts of these tasks of a round, in task order; waits until the last is scored. Each is given out once.

        Errors of workers are raised here.
        """

    @abstractmethod
    def work_until(self, pending: tuple[Any, ...], loading: bool = False) -> None:
        """Keep samplers and reward workers busy until one of other pieces of work, given by their references, is done.

        `loading`: that work begins with a model to load, which may take runtime.ready_seconds.
        """

    @abstractmethod
    def images(self, rollout: Rollout) -> ImageBatch | None:
        """A rollout's images themselves, for a ledger that keeps some; None where they went with their node."""

    @abstractmethod
    def report(self) -> StreamReport:
        """What was done since the last report."""


@dataclass(frozen=True)
class StreamSettings:
    """What both streams are told of the recipe and of the driver."""

    runtime: RuntimeTable
    versions_kept: int
    straggler_factor: float
    check: Check


@dataclass(frozen=True)
class SerialPool:
    """The one reward worker of a pool, in this process, and how it is asked."""

    worker: RewardWorker
    table: RewardPoolTable
    trains: bool = True  # else it holds scorers, which are asked only of images that are looked at


class SerialRolloutStream(RolloutStream):
    """Everything in this process, one task after the other, when its round is collected. Here no call has a deadline."""

    def __init__(self, sampler: Sampler, pools: tuple[SerialPool, ...], settings: StreamSettings) -> None:
        self._sampler = sampler
        self._pools = pools
        self._controls = [Control() for _ in pools]
        self._settings = settings
        self._weights: dict[int, PolicyWeights] = {}
        self._tasks: dict[Place, tuple[Task, PolicyWeights | None]] = {}
        self._retries: dict[str, int] = {}
        self._reported = time.monotonic()
        self._evaluation_seconds = 0.0  # of sampling, since the last report

    def publish(self, weights: PolicyWeights) -> None:
        self._weights[weights.policy_version] = weights
        oldest = weights.policy_version - self._settings.versions_kept
        for version in [version for version in self._weights if version <= oldest]:
            del self._weights[version]

    def submit(self, tasks: list[Task], weights: PolicyWeights | None = None) -> None:
        self._tasks |= {task.place: (task, weights) for task in tasks}

    def collect(self, round_index: int, tasks: range, stream: Stream = Stream.TRAINING) -> list[Rollout]:
        places = [(round_index, int(stream), index) for index in tasks]
        return report_dropped([self._rollout(*self._tasks.pop(place)) for place in places])

    def _rollout(self, task: Task, weights: PolicyWeights | None) -> Rollout:
        self._settings.check()
        report, trajectory, images = self._sampler.sample(task, weights or self._weights[task.policy_version])
        assert report is not None and images is not None, "nobody tells this sampler to forget a task"
        asked = [number for number, pool in enumerate(self._pools) if pool.trains or not task.trains]
        scores = merged_scores([self._scores(number, report, images) for number in asked])
        if not task.trains:
            self._evaluation_seconds += report.seconds
        return Rollout(report, scores, trajectory, images)

    def _scores(self, number: int, report: TaskReport, images: ImageBatch) -> Scores:
        pool, count = self._pools[number], len(images.prompts)
        names, table, control = pool.worker.names, pool.table, self._controls[number]
        job = ScoringJob(names, count, table.batch_size, table.attempts, images, control, report.dropped)
        while not job.finished:
            self._settings.check()
            batch = job.waiting.pop(0)
            time.sleep(batch.pause_seconds)
            try:
                scores = pool.worker.score(job.images_of(batch), batch.first, batch.last)
            except ScoringFailed as error:
                self._count("reward_error")
                job.failed(batch, str(error), error.trace)
                if job.broken:
                    raise job.broken.error(report.task.title) from error
            else:
                if not job.scored(batch, scores):
                    self._count("reward_not_finite")
        return job.scores()

    def _count(self, reason: str) -> None:
        self._retries[reason] = self._retries.get(reason, 0) + 1

    def work_until(self, pending: tuple[Any, ...], loading: bool = False) -> None:
        assert not pending, "in one process nothing is pending"

    def images(self, rollout: Rollout) -> ImageBatch | None:
        return rollout.images

    def report(self) -> StreamReport:
        now = time.monotonic()
        seconds, self._reported = now - self._reported, now
        retries, self._retries = self._retries, {}
        evaluation, self._evaluation_seconds = self._evaluation_seconds, 0.0
        training = sum(pool.trains for pool in self._pools)
        return StreamReport(1, 1, training, seconds, seconds, len(self._tasks), 0, retries, {}, evaluation)


def report_dropped(rollouts: list[Rollout]) -> list[Rollout]:
    """Print a line for each image that could not be scored; returns what it is given."""
    for rollout in rollouts:
        task = rollout.report.task
        for row, reason in rollout.scores.dropped.items():
            which = f"{task.title}, image {row} (seed {task.seeds[row]}, prompt {task.prompts[row].text!r})"
            print(f"{which} is dropped: {reason}", file=sys.stderr, flush=True)
    return rollouts
