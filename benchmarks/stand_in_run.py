"""Run rounds of stand-ins on the real stream, pools, learner group and schedule; compute the ideal."""

import heapq
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.stand_ins import StandInLearner, StandInRewardWorker, StandInSampler
from ray_ddpo.actors.rollouts.ray_stream import Pools, RayRolloutStream
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool
from ray_ddpo.actors.rollouts.stream import StreamSettings
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.policy_versions import last_startable_round
from ray_ddpo.common.policy_weights import weights_of
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.schedule import round_parts, round_tasks
from ray_ddpo.common.trajectory import Rollout, TrainBatch
from ray_ddpo.deploy.driver.colocated_pairs import Pairs
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup

IMAGES_PER_TASK = 4
WEIGHT_BYTES = 3_000_000  # rank-4 adapters of Stable Diffusion 1.5
CPUS_OF_A_SLEEPER = 0.01


@dataclass(frozen=True)
class Proportion:
    """Durations of a round's sides, and the numbers of workers and tasks."""

    name: str
    samplers: int
    reward_workers: int
    tasks: int  # a round
    sample: float  # seconds a task
    score: float  # seconds a task
    update: float  # seconds a round
    parts: int = 1  # that a round is learned from in
    ranks: int = 1  # of the learner, each of which takes the update's seconds
    colocated: bool = False  # each sampler shares its device with a learner rank, in turns

    @property
    def sampling(self) -> float:
        """Return S/N. Tasks are indivisible, so the samplers work in waves."""
        return -(-self.tasks // self.samplers) * self.sample

    @property
    def scoring(self) -> float:
        """Return R/M."""
        return self.tasks * self.score / self.reward_workers

    @property
    def tail(self) -> float:
        """Return r: the scoring time that is left after the last task is sampled."""
        return max(self._scored()) - self.sampling

    def _scored(self) -> list[float]:
        """Return when each task is scored. The first free worker takes the next task."""
        workers, scored = [0.0] * self.reward_workers, []
        for task in range(self.tasks):
            sampled = (task // self.samplers + 1) * self.sample
            scored.append(max(workers[0], sampled) + self.score)
            heapq.heapreplace(workers, scored[-1])
        return scored

    def ideal(self, max_policy_lag: int) -> float:
        """Return the ideal seconds per round."""
        if self.parts > 1:
            return self._ideal_in_parts()
        return ideal_seconds((self.sampling, self.scoring, self.update), self.tail, max_policy_lag)

    def _ideal_in_parts(self) -> float:
        """Return the ideal in parts at lag 0. A part starts when its tasks are scored and the previous part ended."""
        done, size = 0.0, self.tasks // self.parts
        there = self._scored()
        for first in range(0, self.tasks, size):
            done = max(done, *there[first : first + size]) + self.update / self.parts
        return done


def ideal_seconds(sides: tuple[float, float, float], tail: float, max_policy_lag: int) -> float:
    """Return the ideal time of a round from S/N, R/M and U.

    The ideal is the slowest side, or one round's way through all sides divided by the rounds in flight.
    """
    sampling, _, update = sides
    through = sampling + tail + update
    return through if max_policy_lag == 0 else max(*sides, through / (max_policy_lag + 1))


Span = tuple[float, float]  # from, to, in seconds


@dataclass(frozen=True)
class DeviceTime:
    """Shares of the time in which a device's sampler or its learner rank was at work, or both at once."""

    sampling: float
    learning: float
    both: float

    @property
    def busy(self) -> float:
        """Return the share in which the device was at work."""
        return self.sampling + self.learning - self.both


def device_time(sampling: list[Span], learning: list[Span], window: Span) -> DeviceTime:
    """Return a device's shares of a window, from when its sampler and its rank were at work."""
    within = [[_common(span, window) for span in spans] for spans in (sampling, learning)]
    both = sum(_length(_common(one, other)) for one in within[0] for other in within[1])
    return DeviceTime(*(seconds / _length(window) for seconds in (*(sum(map(_length, each)) for each in within), both)))


def _common(one: Span, other: Span) -> Span:
    return max(one[0], other[0]), min(one[1], other[1])


def _length(span: Span) -> float:
    return max(0.0, span[1] - span[0])


@dataclass(frozen=True)
class Measured:
    """Times of a run of stand-ins."""

    seconds: float  # a round
    images_per_second: float
    driver_cores: float  # CPU seconds of the driver's process a second
    idle_samplers: float
    idle_learner: float
    devices: tuple[DeviceTime, ...] = ()  # of colocated pairs


@contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    """Start a new cluster. Its folder has a short path, because a socket's path is limited to 107 bytes."""
    folder = tempfile.mkdtemp(prefix="b", dir="/tmp")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class StandInRun:
    """The driver's loop on stand-ins, without advantages and checkpoints and without a last round."""

    def __init__(self, proportion: Proportion, max_policy_lag: int) -> None:
        self._lag = max_policy_lag
        self._recipe = _recipe(proportion, max_policy_lag)
        budget = RestartBudget(0)
        make_scorer = _maker(StandInRewardWorker, proportion.score)
        scorers = WorkerPool("reward_workers", "reward_worker", make_scorer, proportion.reward_workers, budget)
        self._pairs = Pairs(self._recipe) if proportion.colocated else None
        self._pools = Pools(
            _samplers(proportion, budget, self._pairs),
            (ScoringPool(scorers, ("stand_in",), self._recipe.reward_workers, independent=False),),
            budget,
        )
        settings = StreamSettings(self._recipe.runtime, 4.0, check=lambda: None)
        self._stream = RayRolloutStream(self._pools, settings)
        make = _maker(StandInLearner, proportion.update, max_policy_lag, WEIGHT_BYTES)
        self._update, ranks = proportion.update, range(proportion.ranks)
        places = [self._pairs.of_rank(rank) for rank in ranks] if self._pairs else [{} for _ in ranks]
        self._ranks = [make(rank, options) for rank, options in enumerate(places)]
        self._learner = RayLearnerGroup(
            self._ranks,
            lambda: [make(rank, options) for rank, options in enumerate(places)],
            self._stream.keep_busy_until_ready,
            lambda death: budget.spend("learner", death.reason),
            max_policy_lag,
        )
        self._learner.turn = self._stream.learner_turn if self._pairs else None
        self._stream.wait_until_loaded({"samplers": proportion.samplers, "reward_workers": proportion.reward_workers})
        self._learner.wait_until_loaded()

    def measure(self, warm_up: int, rounds: int) -> Measured:
        """Run, and measure after the first rounds."""
        submitted, process = 0, psutil.Process()
        started = busy = sampled = available = 0.0
        for round_index in range(warm_up + rounds):
            if round_index == warm_up:
                started, busy = time.monotonic(), _cpu_seconds(process)
                sampled = available = 0.0
            while submitted <= last_startable_round(round_index, self._lag):
                tasks = round_tasks(self._recipe, submitted, lambda generator: Prompt("nothing"))
                self._stream.submit(tasks, weights_of(self._learner.weights(), tasks[0].policy_version))
                submitted += 1
            *begun, last = enumerate(round_parts(self._recipe))
            for part, tasks in begun:
                self._learner.begin(*self._collected(round_index, part, tasks))
            ended = self._collected(round_index, *last)
            self._learner.update(*ended)
            sampled += sum(rollout.report.seconds for rollout in ended[1])
            available += self._stream.report().sampler_seconds
        seconds = time.monotonic() - started
        return Measured(
            seconds=seconds / rounds,
            images_per_second=rounds * self._recipe.images_per_round / seconds,
            driver_cores=(_cpu_seconds(process) - busy) / seconds,
            idle_samplers=max(0.0, 1 - sampled / available),
            idle_learner=max(0.0, 1 - rounds * self._update / seconds),
            devices=self._device_times((started, started + seconds)),
        )

    def _device_times(self, window: Span) -> tuple[DeviceTime, ...]:
        """Return the devices' times of a part of the run. A pair is the rank and the sampler of one bundle."""
        if self._pairs is None:
            return ()
        samplers = sorted(self._pools.samplers.workers, key=lambda worker: worker.index)
        sheets = ray.get([actor.timesheet.remote() for actor in (*(each.actor for each in samplers), *self._ranks)])
        pairs = zip(sheets[: len(samplers)], sheets[len(samplers) :], strict=True)
        return tuple(device_time(sampler.worked, rank.worked, window) for sampler, rank in pairs)

    def _collected(self, round_index: int, part: int, tasks: range) -> tuple[TrainBatch, list[Rollout]]:
        rollouts = self._stream.collect(round_index, tasks)
        reports = tuple(rollout.report for rollout in rollouts)
        nothing = np.zeros(len(reports) * IMAGES_PER_TASK)
        return TrainBatch(
            round_index, reports, nothing, part=part, parts=self._recipe.learner.parts_per_round
        ), rollouts

    def close(self) -> None:
        """Stop the actors."""
        self._learner.close()
        for pool in self._pools.all:
            pool.close()
        if self._pairs:
            self._pairs.close()


def run(proportion: Proportion, max_policy_lag: int, warm_up: int, rounds: int) -> Measured:
    """Start the stand-ins, measure, and stop them."""
    stand_ins = StandInRun(proportion, max_policy_lag)
    try:
        return stand_ins.measure(warm_up, rounds)
    finally:
        stand_ins.close()


def _maker(cls: type, *arguments: Any) -> Callable[..., Any]:
    """Return a function that starts a stand-in by number, with further options of Ray if any are given."""
    remote = ray.remote(num_cpus=CPUS_OF_A_SLEEPER, concurrency_groups={"health": 1})(cls)
    return lambda number, options=None: remote.options(**(options or {})).remote(*arguments)


def _samplers(proportion: Proportion, budget: RestartBudget, pairs: Pairs | None) -> WorkerPool:
    make = _maker(StandInSampler, proportion.sample)
    if pairs is None:
        return WorkerPool("samplers", "sampler", make, proportion.samplers, budget)
    beside = lambda number: make(number, pairs.of_sampler(number))  # noqa: E731
    return WorkerPool("samplers", "sampler", beside, proportion.samplers, budget, pairs.free)


def _recipe(proportion: Proportion, max_policy_lag: int) -> Recipe:
    """Return a recipe with the sizes of this proportion."""
    return Recipe.parse(
        {
            "name": "stand-ins",
            "rounds": 1,
            "max_policy_lag": max_policy_lag,
            "policy": {"name": "stand_in"},
            "prompts": {"name": "stand_in"},
            "sampling": {"batch_size": IMAGES_PER_TASK, "batches_per_round": proportion.tasks, "num_steps": 4},
            "reward": {"name": "stand_in"},
            "algorithm": {"name": "stand_in"},
            "learner": {
                "batch_size": IMAGES_PER_TASK * (proportion.tasks if proportion.colocated else 1),
                "micro_batch_size": 1,
                "parts_per_round": proportion.parts,
                "colocated": proportion.colocated,
                "world_size": proportion.ranks if proportion.colocated else 1,
                "num_cpus": CPUS_OF_A_SLEEPER,
            },
            "samplers": {"count": proportion.samplers, "num_cpus": CPUS_OF_A_SLEEPER},
        }
    )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
