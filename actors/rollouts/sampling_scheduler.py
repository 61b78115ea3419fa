"""SamplingScheduler: assign tasks to samplers. If several run a task, the first result counts; all are equal."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from ray_ddpo.actors.rewards.failure import is_poisoned
from ray_ddpo.actors.rollouts.call_names import CallNames
from ray_ddpo.actors.rollouts.current_image import Whereabouts
from ray_ddpo.actors.rollouts.stragglers import StragglerDetector
from ray_ddpo.actors.rollouts.suspects import Suspects
from ray_ddpo.actors.rollouts.worker_pool import Worker, WorkerPool
from ray_ddpo.actors.task_care import PLAIN, Care
from ray_ddpo.common.process_deaths import PROCESS_ENDED
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import TaskReport


@dataclass(frozen=True)
class TaskRequest:
    """A task, and a reference to the weights to sample it with."""

    task: Task
    weights: Any


@dataclass(frozen=True)
class Attempt:
    """A call of a sampler: the task, and references to its three results."""

    request: TaskRequest
    sampler: Worker
    report: Any
    trajectory: Any
    images: Any
    care: Care = PLAIN
    note: Callable[[int], None] | None = None  # notes the current image if images are tried one by one

    @property
    def task(self) -> Task:
        return self.request.task


@dataclass(frozen=True)
class SampledTask:
    """A sampled task: its report, and references to trajectory, images and weights."""

    report: TaskReport
    trajectory: Any
    images: Any
    weights: Any  # used to sample it


class SamplingScheduler:
    """Assigns tasks to samplers in order, one ahead for each, and reassigns tasks of dead samplers and stragglers."""

    def __init__(self, samplers: WorkerPool, stragglers: StragglerDetector, retries: dict[str, int]) -> None:
        self._samplers = samplers
        self._stragglers = stragglers
        self._retries = retries  # by reason; the stream reports them
        self._names = CallNames()
        self._queue: list[Place] = []
        self._queued: set[Place] = set()  # the same tasks
        self._num_queued_training = 0  # training tasks among them
        self._open: dict[Place, TaskRequest] = {}  # not sampled yet
        self._attempts: dict[Any, Attempt] = {}
        self._by_task: dict[Place, dict[Any, Attempt]] = {}  # the same attempts, by task
        self._suspects = Suspects()
        self._whereabouts = Whereabouts()
        self._behind: list[Place] = []  # a heap: tasks that wait behind another one on a sampler, or did once
        self.is_paused = False  # no task is given to a sampler

    def submit(self, task: Task, weights: Any) -> None:
        """Queue a task, with a reference to the weights of its version."""
        self._open[task.place] = TaskRequest(task, weights)
        self._enqueue(task)

    def _enqueue(self, task: Task) -> None:
        if task.place not in self._queued:
            heapq.heappush(self._queue, task.place)
            self._queued.add(task.place)
            self._num_queued_training += task.trains

    def references(self) -> list[Any]:
        """Return the references to wait for: each sampler's first call, since samplers work in order."""
        return [sampler.calls[0] for sampler in self._samplers.workers if sampler.calls]

    def holds(self, reference: Any) -> bool:
        """Return whether a reference is of a call to a sampler."""
        return reference in self._attempts

    def move(self, now: float) -> None:
        """Assign queued tasks, then let idle samplers take over tasks that wait on slow samplers."""
        self._suspect_stragglers(now)
        if self.is_paused:
            return
        while self._training_tasks_queued() and (sampler := self._samplers.free()):
            self._give_next(sampler, now)
        # Never queue evaluation tasks ahead on a sampler, so that training waits for at most one.
        while not self._training_tasks_queued() and (sampler := self._samplers.free()) and not sampler.calls:
            if request := self._waiting_behind():
                self._take_over(request, sampler, now)
            elif self._queue:
                self._give_next(sampler, now)
            else:
                break

    def _training_tasks_queued(self) -> bool:
        """Return whether a training task is queued."""
        return self._num_queued_training > 0

    def _give_next(self, sampler: Worker, now: float) -> None:
        place = heapq.heappop(self._queue)
        self._queued.remove(place)
        self._num_queued_training -= place[1] == Stream.TRAINING
        if place in self._open:
            self._give(self._open[place], sampler, now)

    def _give(self, request: TaskRequest, sampler: Worker, now: float) -> None:
        """Call a sampler with a task, with special care if samplers died over the task."""
        # The name on the dashboard. The class comes first, because Ray names the process alike.
        name = self._names.of(f"Sampler: sample {request.task.title}", f"Sampler: sample {request.task.title_of_round}")
        sample = sampler.actor.sample.options(num_returns=3, name=name)
        care = self._suspects.care(request.task.place)
        note = None if care.one_by_one == "nothing" else self._whereabouts.note()
        carefully = () if care == PLAIN else (care, note)
        report, trajectory, images = sample.remote(request.task, request.weights, *carefully)
        attempt = Attempt(request, sampler, report, trajectory, images, care, note)
        self._attempts[report] = self._by_task.setdefault(request.task.place, {})[report] = attempt
        if sampler.calls:
            heapq.heappush(self._behind, request.task.place)
        self._samplers.give(sampler, report, now)

    def _let_go(self, report: Any) -> Attempt:
        """Remove and return a finished attempt."""
        attempt = self._attempts.pop(report)
        of_task = self._by_task[attempt.task.place]
        del of_task[report]
        if not of_task:
            del self._by_task[attempt.task.place]
        elif len(of_task) == 1:  # the other attempt may wait behind another task
            heapq.heappush(self._behind, attempt.task.place)
        return attempt

    def _suspect_stragglers(self, now: float) -> None:
        """Mark stragglers as suspect, and queue their tasks again."""
        for sampler in self._samplers.loaded:
            if not sampler.calls or sampler.suspect:
                continue
            images = len(self._attempts[sampler.calls[0]].task.seeds)
            if self._stragglers.is_straggler(now - sampler.head_since, images):
                sampler.suspect = True
                for call in sampler.calls:
                    self._again(self._attempts[call].task, "straggler")

    def _again(self, task: Task, reason: str) -> None:
        attempts = self._by_task.get(task.place, {}).values()
        all_suspect = all(attempt.sampler.suspect for attempt in attempts)
        if task.place in self._open and task.place not in self._queued and all_suspect:
            self._retries[reason] = self._retries.get(reason, 0) + 1
            self._enqueue(task)

    def _waiting_behind(self) -> TaskRequest | None:
        """Return the first task that waits behind another one on a sampler, and has no other attempt."""
        while self._behind:
            attempts = list(self._by_task.get(heapq.heappop(self._behind), {}).values())
            alone = attempts[0] if len(attempts) == 1 else None
            if alone and alone.task.place in self._open and alone.sampler.calls[0] != alone.report:
                return alone.request
        return None

    def _take_over(self, request: TaskRequest, sampler: Worker, now: float) -> None:
        for attempt in self._by_task[request.task.place].values():
            attempt.sampler.actor.forget.options(concurrency_group="health").remote(request.task.place)
        self._give(request, sampler, now)

    def finished(self, report: Any, now: float) -> SampledTask | None:
        """Process a finished call.

        An error in the sampler's code is raised.

        Returns:
            The sampled task, or None if it must be re-sampled or was sampled before.
        """
        attempt = self._let_go(report)
        try:
            value: TaskReport | None = ray.get(report)
        except PROCESS_ENDED as error:
            self._sampler_died(attempt, str(error))
            return None
        except RayTaskError as error:
            if is_poisoned(error.cause):
                self._sampler_died(attempt, str(error.cause))
                return None
            self._samplers.answered(attempt.sampler, report, now)
            if not isinstance(error.cause, ObjectLostError):
                raise
            self._again(attempt.task, "object_lost")  # its weights were lost with their node
            return None
        seconds = self._samplers.answered(attempt.sampler, report, now)
        counts = self._suspects.counts(attempt.task.place, attempt.care)
        if value is None or not counts:  # the sampler had to forget the task, or to try its images
            self._again(attempt.task, "forgotten" if counts else "images_tried")
            return None
        self._stragglers.add(seconds, len(attempt.task.seeds))
        if attempt.task.place not in self._open:
            return None
        del self._open[attempt.task.place]
        self._suspects.forget(attempt.task.place)
        return SampledTask(value, attempt.trajectory, attempt.images, attempt.request.weights)

    def _sampler_died(self, attempt: Attempt, reason: str) -> None:
        """Queue a dead sampler's tasks again, and note the first one, which it was working on, as suspect."""
        calls = self._samplers.lost(attempt.sampler, reason, f"at {attempt.task.title}")
        attempts = [attempt, *(self._let_go(call) for call in calls if call in self._attempts)]
        for each in attempts:
            if calls and each.report == calls[0]:
                self._suspects.died(each.task.place, each.care, self._whereabouts.last(each.note))
            self._again(each.task, "sampler_died")

    def give_up_on_silent(self, now: float, seconds: float) -> None:
        """Kill suspect samplers without an answer for `seconds`, so that they are replaced."""
        for sampler in list(self._samplers.loaded):
            if sampler.suspect and now - sampler.head_since > seconds:
                at = f"at {self._attempts[sampler.calls[0]].task.title}"
                for call in self._samplers.lost(sampler, f"no answer for {seconds:.0f} s", at):
                    self._again(self._let_go(call).task, "sampler_silent")

    def give_up_on_needless(self, now: float) -> None:
        """Kill suspect samplers that keep others waiting for a task that another sampler has done, so they are replaced.

        Each has had twice the time after which it became suspect.
        """
        for sampler in [each for each in self._samplers.loaded if each.suspect and each.calls]:
            tasks, waited = [self._attempts[call].task for call in sampler.calls], now - sampler.head_since
            needless = all(task.place not in self._open for task in tasks)
            if needless and self._stragglers.is_straggler(waited / 2, len(tasks[0].seeds)):
                for call in self._samplers.lost(sampler, f"no answer for {waited:.0f} s", f"at {tasks[0].title}"):
                    self._let_go(call)

    @property
    def is_idle(self) -> bool:
        """Return whether no task is left to sample and no sampler is at work, not even on a copy."""
        return not self._open and not any(sampler.calls for sampler in self._samplers.workers)

    def inflight(self) -> int:
        """Return the number of tasks assigned to samplers."""
        return len(self._by_task)

    def waiting_for(self) -> list[str]:
        """List queued and running tasks, for the watchdog's dump."""
        lines = [f"task {place} is queued" for place in sorted(self._queue)]
        for attempt in self._attempts.values():
            lines.append(f"task {attempt.task.place} runs on {attempt.sampler.name}")
        return lines
