"""RayRolloutStream: the rollout stream on a Ray cluster, with workers that join, leave, die and are replaced."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError

from ray_ddpo.actors.rollouts.sampling_scheduler import SamplingScheduler
from ray_ddpo.actors.rollouts.scoring_pools import ScoringPools
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringOutcome, ScoringPool
from ray_ddpo.actors.rollouts.stragglers import StragglerDetector
from ray_ddpo.actors.rollouts.stream import RolloutStream, StreamSettings, report_dropped
from ray_ddpo.actors.rollouts.turns import Turns
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.metrics.round_metrics import StreamReport
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.stored_weights import reference_to
from ray_ddpo.common.trajectory import ImageBatch, Rollout

POLL_SECONDS = 0.5  # the longest delay until deadlines, signals and `ddpo scale` are noticed
STACKS_SECONDS = 5.0
SILENT = f"it does not answer within {STACKS_SECONDS:g} s: the process is stopped, or has no place yet"


class StallError(RuntimeError):
    """No call finished for too long. The message lists which call waits for what."""


@dataclass(frozen=True)
class Pools:
    """The worker pools of the acting side."""

    samplers: WorkerPool
    scoring: tuple[ScoringPool, ...]
    budget: RestartBudget

    @property
    def all(self) -> tuple[WorkerPool, ...]:
        return self.samplers, *(pool.workers for pool in self.scoring)


class RayRolloutStream(RolloutStream):
    """The stream on Ray. The driver handles references, reports and scores only. All waits have deadlines."""

    def __init__(self, pools: Pools, settings: StreamSettings) -> None:
        self._pools = pools
        self._settings = settings
        self._retries: dict[str, int] = {}
        self._sampling = SamplingScheduler(pools.samplers, StragglerDetector(settings.straggler_factor), self._retries)
        self._scoring = ScoringPools(pools.scoring, self._retries)
        self._turns = Turns(self._sampling, pools.samplers, self._wait)
        self._done: dict[Place, Rollout] = {}
        self._evaluation_seconds = 0.0  # seconds of sampling since the last report
        self._moved = time.monotonic()

    def submit(self, tasks: list[Task], weights: PolicyWeights) -> None:
        reference = reference_to(weights)
        for task in tasks:
            self._sampling.submit(task, reference)
        self._sampling.move(time.monotonic())

    def collect(self, round_index: int, tasks: range, stream: Stream = Stream.TRAINING) -> list[Rollout]:
        self._moved = time.monotonic()
        places = [(round_index, int(stream), index) for index in tasks]
        for place in places:
            while place not in self._done:
                self._wait((), f"round {round_index} waits for its {stream.name.lower()} rollouts")
        return report_dropped([self._done.pop(place) for place in places])

    def keep_busy_until_ready(self, pending: tuple[Any, ...], loading: bool = False) -> None:
        """Block until a call of the learner finishes, and keep samplers and reward workers busy meanwhile.

        The driver has one thread. While it only waited for the learner, nobody would pass sampled images to the reward
        workers or give the next task to a sampler: at a lag above 0 sampling would not overlap with learning. Nobody
        would notice dead workers, deadlines, signals or `ddpo scale` either. So waiting for the learner means to
        process the stream's own calls until the learner's call is ready.

        Args:
            pending: references of the learner's calls. The method returns when one of them is ready.
            loading: the calls load a model first, which may take runtime.ready_seconds.
        """
        self._moved = time.monotonic()
        seconds = self._settings.runtime.ready_seconds if loading else None
        while pending and not ray.wait(list(pending), num_returns=1, timeout=0, fetch_local=False)[0]:
            self._wait(pending, "the learner is at work", seconds)

    def learner_turn(self) -> AbstractContextManager[None]:
        """Return a context whose body has the GPUs that samplers share with the learner. See `Turns`."""
        self._moved = time.monotonic()
        return self._turns.learner()

    def wait_until_loaded(self, wanted: dict[str, int]) -> None:
        """Wait until the wanted number of workers of each pool, by name, are loaded. Further workers join later.

        Raises:
            ValueError: they are not loaded within runtime.ready_seconds.
        """
        started = time.monotonic()
        pools = {pool.name: pool for pool in self._pools.all}
        while lacking := {name: count for name, count in wanted.items() if len(pools[name].loaded) < count}:
            seconds = self._settings.runtime.ready_seconds
            if time.monotonic() - started > seconds:
                raise ValueError(
                    f"after runtime.ready_seconds = {seconds:g} these roles have no place or are not loaded: "
                    f"{lacking}; the cluster has {ray.cluster_resources()}, of it free {ray.available_resources()}"
                )
            self._wait((), f"{lacking} have no place or are not loaded", seconds)

    def wait_for_one(self, pool: WorkerPool, seconds: float) -> None:
        """Wait until a worker of a pool is loaded.

        Raises:
            RoleNotStarted: the worker cannot start.
            TimeoutError: no worker is loaded within `seconds`.
        """
        started = time.monotonic()
        while not pool.loaded:
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"none of {pool.name} is loaded after {seconds:g} s")
            self._wait((), f"one of {pool.name} is loading")

    @property
    def samplers(self) -> WorkerPool:
        """The pool of samplers."""
        return self._pools.samplers

    def _wait(self, pending: tuple[Any, ...], what: str, seconds: float | None = None) -> None:
        """Wait until a running call finishes, process its result, and do what is due.

        Args:
            pending: references of the learner's calls, to wait for too.
            what: the reason to wait, for the message of a stall.
            seconds: a longer limit than the watchdog's.

        Raises:
            StallError: no call finished within runtime.watchdog_seconds, or within `seconds` if that is longer.
        """
        self._settings.check()
        now = time.monotonic()
        for pool in self._pools.all:
            pool.tick(now)
        watchdog_seconds = self._settings.runtime.watchdog_seconds
        if now - self._moved < watchdog_seconds / 2:  # other calls finish; otherwise the watchdog ends the run
            self._sampling.give_up_on_silent(now, watchdog_seconds)
        self._sampling.move(now)
        self._scoring.move(now)
        waiting = [*self._sampling.references(), *self._scoring.references(), *pending]
        waiting += [reference for pool in self._pools.all for reference in pool.references()]
        ready = self._ready(waiting)
        for reference in ready:
            self._take(reference)
        if ready:
            self._moved = time.monotonic()
        elif time.monotonic() - self._moved > max(watchdog_seconds, seconds or 0.0):
            raise StallError(self._dump(what))

    def _ready(self, waiting: list[Any]) -> list[Any]:
        if not waiting:  # all workers are dead, and the replacements are not due yet
            time.sleep(POLL_SECONDS)
            return []
        # A call costs time for all references, so take all that are ready at once, and wait only if none is.
        # Without fetch_local=False, Ray would copy ready objects to the driver's node.
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        return ready or ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS, fetch_local=False)[0]

    def _take(self, reference: Any) -> None:
        """Pass a finished call to the scheduler or pool that it belongs to."""
        now = time.monotonic()
        if self._sampling.holds(reference):
            sampled = self._sampling.finished(reference, now)
            if sampled is not None:
                self._keep(self._scoring.submit(sampled))
        elif self._scoring.holds(reference):
            self._keep(self._scoring.finished(reference, now))
        else:
            for pool in self._pools.all:
                pool.take_loaded(reference)

    def _keep(self, outcome: ScoringOutcome) -> None:
        for sampled in outcome.lost:  # its images were lost with their node
            self._sampling.submit(sampled.report.task, sampled.weights)
        for sampled, scores in outcome.scored:
            if not sampled.report.task.trains:
                self._evaluation_seconds += sampled.report.seconds
            self._done[sampled.report.task.place] = Rollout(sampled.report, scores, sampled.trajectory, sampled.images)

    def _dump(self, what: str) -> str:
        """List which call waits for what, and the stacks of every actor."""
        lines = [
            f"nothing was finished for runtime.watchdog_seconds = {self._settings.runtime.watchdog_seconds:g}: {what}"
        ]
        lines += [*self._sampling.waiting_for(), *self._scoring.waiting_for()]
        for pool in self._pools.all:
            lines.append(f"{pool.name}: {len(pool.loaded)} loaded of {pool.wanted}")
            stacks = stacks_of([worker.actor for worker in pool.workers])
            for worker, text in zip(pool.workers, stacks, strict=True):
                lines.append(f"--- {worker.name}, {len(worker.calls)} calls in hand\n{text}")
        return "\n".join(lines)

    def images(self, rollout: Rollout) -> ImageBatch | None:
        try:
            return ray.get(rollout.images)
        except ObjectLostError:
            return None

    def report(self) -> StreamReport:
        samplers, workers = self._pools.samplers, [pool.workers for pool in self._pools.scoring if pool.trains]
        retries = dict(self._retries)
        self._retries.clear()
        evaluation, self._evaluation_seconds = self._evaluation_seconds, 0.0
        return StreamReport(
            len(samplers.loaded),
            samplers.wanted,
            sum(len(pool.loaded) for pool in workers),
            samplers.report_seconds(),
            sum(pool.report_seconds() for pool in workers),
            self._sampling.inflight(),
            len(self._done),
            retries,
            self._pools.budget.report(),
            evaluation,
        )


def stacks_of(actors: list[Any]) -> list[str]:
    """Return the actors' Python stacks, requested at once from their health threads."""
    asked = [actor.stacks.options(concurrency_group="health").remote() for actor in actors]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=STACKS_SECONDS) if asked else ([], [])
    return [_answer(reference) if reference in answered else SILENT for reference in asked]


def _answer(reference: Any) -> str:
    try:
        return ray.get(reference)
    except RayError as error:
        return f"it cannot be asked: {error}"
