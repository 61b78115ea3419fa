"""RolloutStream: sample and score tasks. The interface, and its implementation in one process."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rollouts.inquiry import Control
from ray_ddpo.actors.rollouts.scoring_job import ScoringJob
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.metrics.round_metrics import StreamReport
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import ImageBatch, Rollout, Scores, TaskReport, merged_scores

# Called between steps of work, at least about once a second. It raises to stop a run.
Check = Callable[[], None]


class RolloutStream(ABC):
    """Samples and scores tasks. The rollouts of a round are returned in task order."""

    @abstractmethod
    def submit(self, tasks: list[Task], weights: PolicyWeights) -> None:
        """Queue tasks of one policy version, with its weights."""

    @abstractmethod
    def collect(self, round_index: int, tasks: range, stream: Stream = Stream.TRAINING) -> list[Rollout]:
        """Wait until these tasks of a round are scored, and return their rollouts in task order, each only once.

        Errors of workers are raised here.
        """

    @abstractmethod
    def images(self, rollout: Rollout) -> ImageBatch | None:
        """Return a rollout's images, for the ledger, or None if they were lost with their node."""

    @abstractmethod
    def report(self) -> StreamReport:
        """Report the work since the last report."""


@dataclass(frozen=True)
class StreamSettings:
    """Settings of both streams from recipe and driver."""

    runtime: RuntimeTable
    straggler_factor: float
    check: Check


@dataclass(frozen=True)
class SerialPool:
    """A pool with a single reward worker in this process, and its settings."""

    worker: RewardWorker
    table: RewardPoolTable
    trains: bool = True  # False: the pool has scorers of evaluation, which score no training images


class SerialRolloutStream(RolloutStream):
    """The stream in this process. Tasks are sampled and scored one by one when collected, without deadlines."""

    def __init__(self, sampler: Sampler, pools: tuple[SerialPool, ...], settings: StreamSettings) -> None:
        self._sampler = sampler
        self._pools = pools
        self._controls = [Control() for _ in pools]
        self._settings = settings
        self._tasks: dict[Place, tuple[Task, PolicyWeights]] = {}
        self._retries: dict[str, int] = {}
        self._reported = time.monotonic()
        self._evaluation_seconds = 0.0  # seconds of sampling since the last report

    def submit(self, tasks: list[Task], weights: PolicyWeights) -> None:
        self._tasks |= {task.place: (task, weights) for task in tasks}

    def collect(self, round_index: int, tasks: range, stream: Stream = Stream.TRAINING) -> list[Rollout]:
        places = [(round_index, int(stream), index) for index in tasks]
        return report_dropped([self._rollout(*self._tasks.pop(place)) for place in places])

    def _rollout(self, task: Task, weights: PolicyWeights) -> Rollout:
        """Sample and score a task."""
        self._settings.check()
        report, trajectory, images = self._sampler.sample(task, weights)
        assert report is not None and images is not None, "this sampler is never asked to forget a task"
        asked = [number for number, pool in enumerate(self._pools) if pool.trains or not task.trains]
        scores = merged_scores([self._scores(number, report, images) for number in asked])
        if not task.trains:
            self._evaluation_seconds += report.seconds
        return Rollout(report, scores, trajectory, images)

    def _scores(self, number: int, report: TaskReport, images: ImageBatch) -> Scores:
        """Score a task's images with one pool, with retries."""
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
    """Print a line for each image that could not be scored, and return the rollouts."""
    for rollout in rollouts:
        task = rollout.report.task
        for row, reason in rollout.scores.dropped.items():
            which = f"{task.title}, image {row} (seed {task.seeds[row]}, prompt {task.prompts[row].text!r})"
            print_line(f"{which} is dropped: {reason}")
    return rollouts
