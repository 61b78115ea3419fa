"""Scoring: drawn tasks in reward workers' hands, with a deadline for each batch and another worker after a failure."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.drawing import Drawn
from actors.reward_worker import ScoringFailed
from actors.scoring_job import ScoringBatch, ScoringJob, backoff_seconds
from actors.worker_pool import Worker, WorkerPool
from common.config import RewardWorkersTable
from common.trajectory import Rollout, Scores


@dataclass(eq=False)
class _Open:
    """A drawn task whose pictures are being scored."""

    drawn: Drawn
    job: ScoringJob
    not_before: float = 0.0
    last_failed: Worker | None = None
    gone: bool = False  # its pictures are lost: the task is drawn again


@dataclass(frozen=True)
class _Call:
    """A batch in a reward worker's hands."""

    open: _Open
    batch: ScoringBatch
    worker: Worker


class Scoring:
    """Hands batches out in order; counts only the reward's own errors, time-outs and non-finite answers against it."""

    def __init__(
        self, workers: WorkerPool, names: tuple[str, ...], table: RewardWorkersTable, retries: dict[str, int]
    ) -> None:
        self._workers = workers
        self._names = names
        self._table = table
        self._retries = retries
        self._open: list[_Open] = []
        self._calls: dict[Any, _Call] = {}

    def submit(self, drawn: Drawn) -> None:
        """Queue a drawn task."""
        job = ScoringJob(self._names, len(drawn.report.task.seeds), self._table.batch_size, self._table.attempts)
        self._open.append(_Open(drawn, job))

    def references(self) -> list[Any]:
        """What to wait for."""
        return list(self._calls)

    def holds(self, reference: Any) -> bool:
        """Whether `reference` is one of them."""
        return reference in self._calls

    def move(self, now: float) -> None:
        """End workers whose batch is past its deadline, and hand out what waits."""
        for worker in list(self._workers.loaded):
            if worker.calls and now - worker.head_since > self._table.timeout_seconds:
                self._timed_out(worker, now)
        for open in self._open:
            while open.job.waiting and now >= open.not_before and (worker := self._workers.free(open.last_failed)):
                batch = open.job.waiting.pop(0)
                call = worker.actor.score.remote(open.drawn.images, batch.first, batch.last)
                self._calls[call] = _Call(open, batch, worker)
                self._workers.give(worker, call, now)

    def _timed_out(self, worker: Worker, now: float) -> None:
        reason = f"no scores within reward_workers.timeout_seconds = {self._table.timeout_seconds:g}"
        head, *others = self._workers.lost(worker, reason)
        for call in others:
            self._again(self._calls.pop(call))
        self._failed(self._calls.pop(head), reason, "reward_timeout", now)

    def _again(self, call: _Call) -> None:
        self._count("reward_worker_died")
        call.open.job.lost(call.batch)

    def _failed(self, call: _Call, reason: str, kind: str, now: float) -> None:
        self._count(kind)
        call.open.job.failed(call.batch, reason)
        self._pause(call, now)

    def _pause(self, call: _Call, now: float) -> None:
        call.open.not_before = now + backoff_seconds(call.batch.failures + 1)
        call.open.last_failed = call.worker

    def _count(self, reason: str) -> None:
        self._retries[reason] = self._retries.get(reason, 0) + 1

    def finished(self, reference: Any, now: float) -> Rollout | Drawn | None:
        """What came of a call that is over: a scored task, a task whose pictures are lost, or nothing yet.

        RewardMistake, and any error that is not the reward's over one batch, is raised.
        """
        call = self._calls.pop(reference)
        try:
            scores: Scores = ray.get(reference)
        except RayActorError as error:
            lost = self._workers.lost(call.worker, str(error))
            for other in (call, *(self._calls.pop(each) for each in lost if each in self._calls)):
                self._again(other)
            return None
        except RayTaskError as error:
            self._workers.answered(call.worker, reference, now)
            if isinstance(error.cause, ObjectLostError):
                return self._pictures_lost(call)
            if not isinstance(error.cause, ScoringFailed):
                raise
            self._failed(call, str(error.cause), "reward_error", now)
            return self._rollout(call.open)
        self._workers.answered(call.worker, reference, now)
        if not call.open.job.scored(call.batch, scores):
            self._count("reward_not_finite")
            self._pause(call, now)
        return self._rollout(call.open)

    def _pictures_lost(self, call: _Call) -> Drawn | None:
        """The task, to be drawn again; once, however many of its batches were under way."""
        self._count("object_lost")
        if call.open.gone:
            return None
        call.open.gone = True
        self._open.remove(call.open)
        return call.open.drawn

    def _rollout(self, open: _Open) -> Rollout | None:
        if open.gone or not open.job.finished:
            return None
        self._open.remove(open)
        return Rollout(open.drawn.report, open.job.scores(), open.drawn.trajectory, open.drawn.images)

    def waiting_for(self) -> list[str]:
        """Who has what in hand, a line each, for the watchdog's dump."""
        lines = [f"pictures of task {open.drawn.report.task.place} wait for scores" for open in self._open]
        for call in self._calls.values():
            lines.append(f"task {call.open.drawn.report.task.place} is in the hands of {call.worker.name}")
        return lines
