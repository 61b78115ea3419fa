"""ScoringScheduler: sampled tasks on a pool of reward workers, with a deadline per batch and another worker after a failure."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rollouts.call_names import CallNames
from ray_ddpo.actors.rollouts.current_image import Whereabouts
from ray_ddpo.actors.rollouts.inquiry import Control
from ray_ddpo.actors.rollouts.sampling_scheduler import SampledTask
from ray_ddpo.actors.rollouts.scoring_job import ScoringBatch, ScoringJob
from ray_ddpo.actors.rollouts.worker_pool import Worker, WorkerPool
from ray_ddpo.common.recipe.tables import RewardPoolTable
from ray_ddpo.common.schedule import Place, Task
from ray_ddpo.common.trajectory import Scores


@dataclass(frozen=True)
class ScoringPool:
    """Reward workers that hold the same rewards, and how they are asked."""

    workers: WorkerPool
    names: tuple[str, ...]  # of the rewards
    table: RewardPoolTable
    independent: bool  # whether an image's scores do not depend on its batch: then batches are made of several tasks
    trains: bool = True  # else it holds scorers, which are asked only of images that are looked at

    def scores(self, task: Task) -> bool:
        """Whether a task's images are for these workers."""
        return self.trains or not task.trains


@dataclass(frozen=True)
class ScoringOutcome:
    """What came of a call that is over: tasks whose images all have their scores, and tasks whose images are lost."""

    scored: tuple[tuple[SampledTask, Scores], ...] = ()
    lost: tuple[SampledTask, ...] = ()


@dataclass(eq=False)
class _Open:
    """A sampled task whose images are being scored."""

    sampled: SampledTask
    job: ScoringJob
    not_before: float = 0.0
    paused: bool = False  # until then, after a failure
    last_failed: Worker | None = None
    gone: bool = False  # its images are lost: the task is re-sampled
    listed: bool = False  # among those that a worker may be given now

    @property
    def place(self) -> Place:
        return self.sampled.report.task.place


@dataclass(frozen=True)
class _Call:
    """Batches in a reward worker's hands: one, or several that are scored as one."""

    parts: tuple[tuple[_Open, ScoringBatch], ...]
    worker: Worker
    note: Callable[[int], None] | None = None  # where images are scored one by one: tells which is in hand

    @property
    def title(self) -> str:
        """As the dashboard shows it."""
        pieces = [
            f"{open.sampled.report.task.title}, images {batch.first}-{batch.last - 1}" for open, batch in self.parts
        ]
        return f"RewardWorker: score {'; '.join(pieces)}"

    @property
    def title_of_round(self) -> str:
        """The same of the first task's round."""
        return f"RewardWorker: score {self.parts[0][0].sampled.report.task.title_of_round}"


class ScoringScheduler:
    """Hands batches out in order; counts only the reward's own errors, time-outs and non-finite answers against it."""

    def __init__(self, pool: ScoringPool, retries: dict[str, int]) -> None:
        self._pool = pool
        self._workers = pool.workers
        self._retries = retries
        self._names = CallNames()
        self._open: dict[Place, _Open] = {}
        self._listed: list[Place] = []  # a heap: tasks with batches that wait for a worker
        self._paused: list[_Open] = []  # tasks whose batches wait for their time, after a failure
        self._calls: dict[Any, _Call] = {}
        self._control = Control()
        self._whereabouts = Whereabouts()

    def submit(self, sampled: SampledTask) -> None:
        """Queue a sampled task, of which at least one row has an image."""
        table, report = self._pool.table, sampled.report
        asked = self._pool.names, len(report.task.seeds), table.batch_size, table.attempts
        job = ScoringJob(*asked, sampled.images, self._control, report.dropped)
        open = self._open[report.task.place] = _Open(sampled, job)
        self._list(open)

    def _list(self, open: _Open) -> None:
        if open.job.waiting and not (open.listed or open.paused or open.gone):
            open.listed = True
            heapq.heappush(self._listed, open.place)

    def references(self) -> list[Any]:
        """What to wait for."""
        return list(self._calls)

    def holds(self, reference: Any) -> bool:
        """Whether `reference` is one of them."""
        return reference in self._calls

    def move(self, now: float) -> None:
        """End workers whose batch is past its deadline, and hand out what waits."""
        for worker in list(self._workers.loaded):
            if worker.calls and now - worker.head_since > self._pool.table.timeout_seconds:
                self._timed_out(worker, now)
        self._list_paused(now)
        while (open := self._next()) and (worker := self._workers.free(open.last_failed)):
            self._give(worker, self._next_parts(open), now)

    def _list_paused(self, now: float) -> None:
        """Whoever was paused, from his time on."""
        paused, self._paused = self._paused, []
        for open in paused:
            if now < open.not_before:
                self._paused.append(open)
            else:
                open.paused = False
                self._list(open)

    def _next(self) -> _Open | None:
        """The first task with a batch that a worker may be given now."""
        while self._listed:
            open = self._open.get(self._listed[0])
            if open and open.listed and open.job.waiting:
                return open
            heapq.heappop(self._listed)
            if open:
                open.listed = False
        return None

    def _next_parts(self, open: _Open) -> tuple[tuple[_Open, ScoringBatch], ...]:
        """The task's next batch; where batches do not matter, filled up with what the next tasks have waiting now."""
        parts = [(open, open.job.waiting.pop(0))]
        if self._pool.independent and parts[0][1].is_new:
            room = self._pool.table.batch_size - parts[0][1].size
            while (other := self._next()) and other.job.waiting[0].is_new and other.job.waiting[0].size <= room:
                parts.append((other, other.job.waiting.pop(0)))
                room -= parts[-1][1].size
        return tuple(parts)

    def _give(self, worker: Worker, parts: tuple[tuple[_Open, ScoringBatch], ...], now: float) -> None:
        note = self._whereabouts.note() if parts[0][1].one_by_one else None
        call = _Call(parts, worker, note)
        name = self._names.of(call.title, call.title_of_round)
        if len(parts) == 1:
            ((open, batch),) = parts
            score = worker.actor.score.options(name=name)
            noted = (note,) if note else ()
            reference = score.remote(open.job.images_of(batch), batch.first, batch.last, *noted)
        else:
            cuts = tuple((batch.first, batch.last) for _, batch in parts)
            score = worker.actor.score_together.options(name=name)
            reference = score.remote(cuts, *(open.sampled.images for open, _ in parts))
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
        for open, batch in reversed(call.parts):
            open.job.lost(batch, to_blame, row)
            self._raise_if_broken(open)
            self._list(open)

    def _failed(self, call: _Call, reason: str, kind: str, now: float, trace: str = "") -> None:
        self._count(kind)
        for open, batch in call.parts:
            open.job.failed(batch, reason, trace)
            self._raise_if_broken(open)
            self._pause(open, call.worker, now)

    def _raise_if_broken(self, open: _Open) -> None:
        if open.job.broken and not open.gone:
            raise open.job.broken.error(open.sampled.report.task.title)

    def _pause(self, open: _Open, worker: Worker, now: float) -> None:
        """Let the task wait before its next batch, where that is another attempt."""
        open.last_failed = worker
        seconds = open.job.waiting[0].pause_seconds if open.job.waiting else 0.0
        if not seconds:
            self._list(open)
            return
        open.not_before = now + seconds
        open.listed = False
        if not open.paused:
            open.paused = True
            self._paused.append(open)

    def _count(self, reason: str) -> None:
        self._retries[reason] = self._retries.get(reason, 0) + 1

    def finished(self, reference: Any, now: float) -> ScoringOutcome:
        """What came of a call that is over.

        RewardMistake, RewardFailed, and any error that is not the reward's over one batch, is raised.
        """
        try:
            answer: Any = ray.get(reference)  # one batch's scores, or a list of several's
        except RayActorError as error:
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
        for (open, batch), scores in zip(call.parts, answers, strict=True):
            if not open.job.scored(batch, scores):
                self._count("reward_not_finite")
                self._pause(open, call.worker, now)
            self._list(open)
        return self._done(call)

    def _lost_with_worker(self, reference: Any, reason: str) -> ScoringOutcome:
        """End the call's worker. Of the calls in its hands the first was under way."""
        in_hands = self._workers.lost(self._calls[reference].worker, reason)
        blamed = in_hands[:1]
        calls = [(self._calls.pop(each), each in blamed) for each in dict.fromkeys((*in_hands, reference))]
        for call, to_blame in calls:
            self._again(call, to_blame)
        return self._done(*(call for call, _ in calls))

    def _images_lost(self, call: _Call) -> ScoringOutcome:
        """The call's tasks, to be re-sampled; each once, however many of its batches were under way.

        Of several tasks one alone may have lost its images, and Ray does not say which.
        """
        self._count("object_lost")
        if any(batch.of_control for _, batch in call.parts):
            self._control.images = None
        lost = [open for open in dict.fromkeys(open for open, _ in call.parts) if not open.gone]
        for open in lost:
            self._close(open)
        return ScoringOutcome(lost=tuple(open.sampled for open in lost))

    def forget(self, sampled: SampledTask) -> None:
        """The task's images are lost, as another pool has found: it will be submitted again."""
        open = self._open.get(sampled.report.task.place)
        if open and open.sampled is sampled:
            self._close(open)

    def _close(self, open: _Open) -> None:
        open.gone = True
        del self._open[open.place]

    def _done(self, *calls: _Call) -> ScoringOutcome:
        opens = dict.fromkeys(open for call in calls for open, _ in call.parts)
        done = [open for open in opens if not open.gone and open.job.finished]
        for open in done:
            del self._open[open.place]
        return ScoringOutcome(tuple((open.sampled, open.job.scores()) for open in done))

    def waiting_for(self) -> list[str]:
        """Who has what in hand, a line each, for the watchdog's dump."""
        what = ", ".join(self._pool.names)
        lines = [f"images of task {open.place} wait for scores of {what}" for open in self._open.values()]
        for call in self._calls.values():
            places = ", ".join(str(open.place) for open, _ in call.parts)
            lines.append(f"task {places} is in the hands of {call.worker.name}")
        return lines
