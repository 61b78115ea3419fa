"""RolloutStream: tasks in, scored rollouts out; on Ray, and the same in one process."""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from actors.reward_worker import RewardWorker
from actors.sampler import Sampler
from common.lora_weights import LoraWeights
from common.schedule import Task
from common.trajectory import Rollout, TaskReport

TASKS_AHEAD = 2  # a sampler has one task in hand and one waiting, so that none waits for a round trip


class RolloutStream(ABC):
    """Draws and scores tasks. A round comes back whole and in task order, whoever was first."""

    @abstractmethod
    def publish(self, policy_version: int, weights: Any) -> None:
        """Make a policy version available to tasks; `weights` may be a reference."""

    @abstractmethod
    def submit(self, tasks: list[Task]) -> None:
        """Queue a round's tasks. Their policy version must have been published."""

    @abstractmethod
    def collect(self, round: int) -> list[Rollout]:
        """All rollouts of a round, in task order; waits until the last is scored. Errors of workers are raised here."""

    @abstractmethod
    def work_until(self, pending: tuple[Any, ...]) -> None:
        """Keep samplers and reward workers busy until other work, given by its references, is done."""


class SerialRolloutStream(RolloutStream):
    """Everything in this process, one task after the other, when its round is collected."""

    def __init__(self, sampler: Sampler, reward_worker: RewardWorker, versions_kept: int) -> None:
        self._sampler = sampler
        self._reward_worker = reward_worker
        self._versions_kept = versions_kept
        self._weights: dict[int, LoraWeights] = {}
        self._tasks: dict[int, list[Task]] = {}

    def publish(self, policy_version: int, weights: LoraWeights) -> None:
        self._weights[policy_version] = weights
        for version in [version for version in self._weights if version <= policy_version - self._versions_kept]:
            del self._weights[version]

    def submit(self, tasks: list[Task]) -> None:
        self._tasks[tasks[0].round] = tasks

    def collect(self, round: int) -> list[Rollout]:
        return [self._rollout(task) for task in self._tasks.pop(round)]

    def _rollout(self, task: Task) -> Rollout:
        report, trajectory, images = self._sampler.draw(task, self._weights[task.policy_version])
        return Rollout(report, self._reward_worker.score(images), trajectory, images)

    def work_until(self, pending: tuple[Any, ...]) -> None:
        assert not pending, "in one process nothing is pending"


@dataclass(frozen=True)
class _Drawing:
    """A task in a sampler's hands: references to its three results."""

    task: Task
    sampler: int
    report: Any
    trajectory: Any
    images: Any


@dataclass(frozen=True)
class _Scoring:
    """A drawn task in a reward worker's hands."""

    drawn: _Drawing
    report: TaskReport
    worker: int


class RayRolloutStream(RolloutStream):
    """Samplers and reward workers on Ray. The driver carries references, reports and scores, and opens nothing heavy."""

    def __init__(self, samplers: list[Any], reward_workers: list[Any], versions_kept: int) -> None:
        self._samplers = samplers
        self._reward_workers = reward_workers
        self._versions_kept = versions_kept
        self._weights: dict[int, Any] = {}
        self._queue: deque[Task] = deque()
        self._drawing: dict[Any, _Drawing] = {}
        self._scoring: dict[Any, _Scoring] = {}
        self._done: dict[int, dict[int, Rollout]] = {}
        self._expected: dict[int, int] = {}

    def publish(self, policy_version: int, weights: Any) -> None:
        reference = ray.put(weights) if isinstance(weights, LoraWeights) else weights
        self._weights[policy_version] = reference
        for version in [version for version in self._weights if version <= policy_version - self._versions_kept]:
            del self._weights[version]

    def submit(self, tasks: list[Task]) -> None:
        self._expected[tasks[0].round] = len(tasks)
        self._queue.extend(tasks)
        self._hand_out()

    def collect(self, round: int) -> list[Rollout]:
        while len(self._done.get(round, {})) < self._expected[round]:
            self._wait(())
        del self._expected[round]
        done = self._done.pop(round)
        return [done[index] for index in sorted(done)]

    def work_until(self, pending: tuple[Any, ...]) -> None:
        while len(ray.wait(list(pending), num_returns=len(pending), timeout=0, fetch_local=False)[0]) < len(pending):
            self._wait(pending)

    def _wait(self, pending: tuple[Any, ...]) -> None:
        """Sleep until one of all the things under way is done, and pass it on."""
        waiting = [*self._drawing, *self._scoring, *pending]
        # Without fetch_local=False Ray would pull what is ready to the driver's node.
        for reference in ray.wait(waiting, num_returns=1, fetch_local=False)[0]:
            if reference in self._drawing:
                self._pass_to_reward_worker(self._drawing.pop(reference))
            elif reference in self._scoring:
                self._keep(self._scoring.pop(reference), reference)

    def _hand_out(self) -> None:
        """Give queued tasks, in order, to the samplers with the fewest in hand."""
        load = [0] * len(self._samplers)
        for drawing in self._drawing.values():
            load[drawing.sampler] += 1
        while self._queue and min(load) < TASKS_AHEAD:
            task, sampler = self._queue.popleft(), load.index(min(load))
            draw = self._samplers[sampler].draw.options(num_returns=3)
            report, trajectory, images = draw.remote(task, self._weights[task.policy_version])
            self._drawing[report] = _Drawing(task, sampler, report, trajectory, images)
            load[sampler] += 1

    def _pass_to_reward_worker(self, drawn: _Drawing) -> None:
        self._hand_out()
        report: Any = ray.get(drawn.report)
        load = [0] * len(self._reward_workers)
        for scoring in self._scoring.values():
            load[scoring.worker] += 1
        worker = load.index(min(load))
        scores = self._reward_workers[worker].score.remote(drawn.images)
        self._scoring[scores] = _Scoring(drawn, report, worker)

    def _keep(self, scored: _Scoring, scores: Any) -> None:
        rollout = Rollout(scored.report, ray.get(scores), scored.drawn.trajectory, scored.drawn.images)
        self._done.setdefault(scored.report.task.round, {})[scored.report.task.index] = rollout
