"""ScoringScheduler: score sampled tasks on a pool of reward workers, with deadlines and retries."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rollouts.call_names import CallNames
from ray_ddpo.actors.rollouts.current_image import Whereabouts
from ray_ddpo.actors.rollouts.inquiry import Control
from ray_ddpo.actors.rollouts.sampling_scheduler import SampledTask
from ray_ddpo.actors.rollouts.scoring_job import ScoringBatch, ScoringJob
from ray_ddpo.actors.rollouts.worker_pool import Worker, WorkerPool
from ray_ddpo.common.process_deaths import PROCESS_ENDED
from ray_ddpo.common.recipe.tables import RewardPoolTable
from ray_ddpo.common.schedule import Place, Task
from ray_ddpo.common.trajectory import Scores


@dataclass(frozen=True)
class ScoringPool:
    """A pool of reward workers with the same rewards, and its settings."""

    workers: WorkerPool
    names: tuple[str, ...]  # of the rewards
    table: RewardPoolTable
    independent: bool  # scores do not depend on the batch, so batches may contain several tasks' images
    trains: bool = True  # False: the pool has scorers of evaluation, which score no training images

    def scores(self, task: Task) -> bool:
        """Return whether this pool scores a task's images."""
        return self.trains or not task.trains


@dataclass(frozen=True)
class ScoringOutcome:
    """The outcome of a finished call: tasks whose images are all scored, and tasks whose images are lost."""

    scored: tuple[tuple[SampledTask, Scores], ...] = ()
    lost: tuple[SampledTask, ...] = ()


@dataclass(eq=False)
class _ScoringTask:
    """A sampled task whose images are being scored."""

    sampled: SampledTask
    job: ScoringJob
    not_before: float = 0.0
    paused: bool = False  # until `not_before`, after a failure
    last_failed: Worker | None = None
    gone: bool = False  # its images are lost, so the task is re-sampled
    listed: bool = False  # in the heap of tasks that may be assigned now

    @property
    def place(self) -> Place:
        return self.sampled.report.task.place


@dataclass(frozen=True)
class _Call:
    """A call of a reward worker: one batch, or several that are scored as one."""

    parts: tuple[tuple[_ScoringTask, ScoringBatch], ...]
    worker: Worker
    note: Callable[[int], None] | None = None  # notes the current image if images are scored one by one

    @property
    def title(self) -> str:
        """The name on the dashboard, by task."""
        pieces = [
            f"{task.sampled.report.task.title}, images {batch.first}-{batch.last - 1}" for task, batch in self.parts
        ]
        return f"RewardWorker: score {'; '.join(pieces)}"

    @property
    def title_of_round(self) -> str:
        """The name on the dashboard, by the first task's round."""
        return f"RewardWorker: score {self.parts[0][0].sampled.report.task.title_of_round}"


class ScoringScheduler:
    """Assigns batches in order. Only errors, time-outs and non-finite values count against a reward."""

    def __init__(self, pool: ScoringPool, retries: dict[str, int]) -> None:
        self._pool = pool
        self._workers = pool.workers
        self._retries = retries
        self._names = CallNames()
        self._open: dict[Place, _ScoringTask] = {}
        self._listed: list[Place] = []  # a heap: tasks with batches that wait for a worker
        self._paused: list[_ScoringTask] = []  # tasks that wait until `not_before`
        self._calls: dict[Any, _Call] = {}
        self._control = Control()
        self._whereabouts = Whereabouts()

    def submit(self, sampled: SampledTask) -> None:
        """Queue a sampled task. At least one row must have an image."""
        table, report = self._pool.table, sampled.report
        asked = self._pool.names, len(report.task.seeds), table.batch_size, table.attempts
        job = ScoringJob(*asked, sampled.images, self._control, report.dropped)
        task = self._open[report.task.place] = _ScoringTask(sampled, job)
        self._list(task)

    def _list(self, task: _ScoringTask) -> None:
        if task.job.waiting and not (task.listed or task.paused or task.gone):
            task.listed = True
            heapq.heappush(self._listed, task.place)

    def references(self) -> list[Any]:
        """Return the references to wait for."""
        return list(self._calls)

    def holds(self, reference: Any) -> bool:
        """Return whether a reference is of a call to this pool."""
        return reference in self._calls

    def move(self, now: float) -> None:
        """Kill workers whose batch is past its deadline, and assign waiting batches."""
        for worker in list(self._workers.loaded):
            if worker.calls and now - worker.head_since > self._pool.table.timeout_seconds:
                self._timed_out(worker, now)
        self._list_paused(now)
        while (task := self._next()) and (worker := self._workers.free(task.last_failed)):
            self._give(worker, self._next_parts(task), now)

    def _list_paused(self, now: float) -> None:
        """List paused tasks again whose pause is over."""
        paused, self._paused = self._paused, []
        for task in paused:
            if now < task.not_before:
                self._paused.append(task)
            else:
                task.paused = False
                self._list(task)

    def _next(self) -> _ScoringTask | None:
        """Return the first task with a batch that may be assigned now."""
        while self._listed:
            task = self._open.get(self._listed[0])
            if task and task.listed and task.job.waiting:
                return task
            heapq.heappop(self._listed)
            if task:
                task.listed = False
        return None

    def _next_parts(self, task: _ScoringTask) -> tuple[tuple[_ScoringTask, ScoringBatch], ...]:
        """Return the task's next batch, filled up with other tasks' batches if scores are independent of the batch."""
        parts = [(task, task.job.waiting.pop(0))]
        if self._pool.independent and parts[0][1].is_new:
            room = self._pool.table.batch_size - parts[0][1].size
            while (other := self._next()) and other.job.waiting[0].is_new and other.job.waiting[0].size <= room:
                parts.append((other, other.job.waiting.pop(0)))
                room -= parts[-1][1].size
        return tuple(parts)

    def _give(self, worker: Worker, parts: tuple[tuple[_ScoringTask, ScoringBatch], ...], now: float) -> None:
        """Call a worker with one batch, or with several as one."""
        note = self._whereabouts.note() if parts[0][1].one_by_one else None
        call = _Call(parts, worker, note)
        name = self._names.of(call.title, call.title_of_round)
        if len(parts) == 1:
            ((task, batch),) = parts
            score = worker.actor.score.options(name=name)
            noted = (note,) if note else ()
            reference = score.remote(task.job.images_of(batch), batch.first, batch.last, *noted)
        else:
            cuts = tuple((batch.first, batch.last) for _, batch in parts)
            score = worker.actor.score_together.options(name=name)
            reference = score.remote(cuts, *(task.sampled.images for task, _ in parts))
        self._calls[reference] = call
        self._workers.give(worker, reference, now)

    def _timed_out(self, worker: Worker, now: float) -> None:
        reason = f"no scores within timeout_seconds = {self._pool.table.timeout_seconds:g} of {self._workers.name}"
        head, *others = self._workers.lost(worker, reason)
        for reference in others:
            self._again(self._calls.pop(reference))
        self._failed(self._calls.pop(head), reason, "reward_timeout", now)

    def _again(self, call: _Call, to_blame: bool = False) -> None:
        self._count("reward_worker_died")
        row = self._whereabouts.last(call.note) if to_blame else None
        for task, batch in reversed(call.parts):
            task.job.lost(batch, to_blame, row)
            self._raise_if_broken(task)
            self._list(task)

    def _failed(self, call: _Call, reason: str, kind: str, now: float, trace: str = "") -> None:
        self._count(kind)
        for task, batch in call.parts:
            task.job.failed(batch, reason, trace)
            self._raise_if_broken(task)
            self._pause(task, call.worker, now)

    def _raise_if_broken(self, task: _ScoringTask) -> None:
        if task.job.broken and not task.gone:
            raise task.job.broken.error(task.sampled.report.task.title)

    def _pause(self, task: _ScoringTask, worker: Worker, now: float) -> None:
        """Pause the task if its next batch is a retry; otherwise list it again."""
        task.last_failed = worker
        seconds = task.job.waiting[0].pause_seconds if task.job.waiting else 0.0
        if not seconds:
            self._list(task)
            return
        task.not_before = now + seconds
        task.listed = False
        if not task.paused:
            task.paused = True
            self._paused.append(task)

    def _count(self, reason: str) -> None:
        self._retries[reason] = self._retries.get(reason, 0) + 1

    def finished(self, reference: Any, now: float) -> ScoringOutcome:
        """Process a finished call.

        RewardMistake, RewardFailed, and any error that is not a reward's for a single batch, is raised.
        """
        try:
            answer: Any = ray.get(reference)  # scores of one batch, or a list for several
        except PROCESS_ENDED as error:
            return self._lost_with_worker(reference, str(error))
        except RayTaskError as error:
            failure = error.cause
            if isinstance(failure, ScoringFailed) and failure.poisoned:
                return self._lost_with_worker(reference, str(failure))
            call = self._calls.pop(reference)
            self._workers.answered(call.worker, reference, now)
            if isinstance(failure, ObjectLostError):
                return self._images_lost(call)
            if not isinstance(failure, ScoringFailed):
                raise
            self._failed(call, str(failure), "reward_error", now, failure.trace)
            return self._done(call)
        call = self._calls.pop(reference)
        self._workers.answered(call.worker, reference, now)
        answers: list[Scores] = [answer] if len(call.parts) == 1 else answer
        for (task, batch), scores in zip(call.parts, answers, strict=True):
            if not task.job.scored(batch, scores):
                self._count("reward_not_finite")
                self._pause(task, call.worker, now)
            self._list(task)
        return self._done(call)

    def _lost_with_worker(self, reference: Any, reason: str) -> ScoringOutcome:
        """Handle the death of a call's worker. Only its first call was running, and is to blame."""
        in_hands = self._workers.lost(self._calls[reference].worker, reason)
        blamed = in_hands[:1]
        calls = [(self._calls.pop(each), each in blamed) for each in dict.fromkeys((*in_hands, reference))]
        for call, to_blame in calls:
            self._again(call, to_blame)
        return self._done(*(call for call, _ in calls))

    def _images_lost(self, call: _Call) -> ScoringOutcome:
        """Return the call's tasks to be re-sampled, each once even if several of its batches were running.

        With several tasks, perhaps only one lost its images, but Ray does not say which.
        """
        self._count("object_lost")
        if any(batch.of_control for _, batch in call.parts):
            self._control.images = None
        lost = [task for task in dict.fromkeys(task for task, _ in call.parts) if not task.gone]
        for task in lost:
            self._close(task)
        return ScoringOutcome(lost=tuple(task.sampled for task in lost))

    def forget(self, sampled: SampledTask) -> None:
        """Forget a task whose images are lost, as another pool found. The task will be submitted again."""
        task = self._open.get(sampled.report.task.place)
        if task and task.sampled is sampled:
            self._close(task)

    def _close(self, task: _ScoringTask) -> None:
        task.gone = True
        del self._open[task.place]

    def _done(self, *calls: _Call) -> ScoringOutcome:
        tasks = dict.fromkeys(task for call in calls for task, _ in call.parts)
        done = [task for task in tasks if not task.gone and task.job.finished]
        for task in done:
            del self._open[task.place]
        return ScoringOutcome(tuple((task.sampled, task.job.scores()) for task in done))

    def waiting_for(self) -> list[str]:
        """List waiting images and running batches, for the watchdog's dump."""
        what = ", ".join(self._pool.names)
        lines = [f"images of task {task.place} wait for scores of {what}" for task in self._open.values()]
        for call in self._calls.values():
            places = ", ".join(str(task.place) for task, _ in call.parts)
            lines.append(f"task {places} runs on {call.worker.name}")
        return lines
