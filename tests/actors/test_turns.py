"""Samplers and learner take turns: what must end before the learner's begins, and what must not begin within it."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayActorError

from ray_ddpo.actors.rollouts import sampling_scheduler, turns, worker_pool
from ray_ddpo.actors.rollouts.sampling_scheduler import SamplingScheduler
from ray_ddpo.actors.rollouts.stragglers import StragglerDetector
from ray_ddpo.actors.rollouts.turns import SLEEP_SECONDS, Turns
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, Worker, WorkerPool
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import TaskReport
from tests.actors.stand_in_actors import Actor, Answers, Nowhere

SECONDS = 10.0  # of a task
_references = itertools.count(10**6)


@dataclass(eq=False)
class Sleep:
    """The method `sleep` of a sampler; its calls are answered by the test."""

    calls: list[int] = field(default_factory=list)

    def remote(self) -> int:
        self.calls.append(next(_references))
        return self.calls[-1]


@dataclass(eq=False)
class SleepyActor(Actor):
    """A sampler that can sleep."""

    sleep: Sleep = field(default_factory=Sleep)


class Ray(Answers):
    """A fake of the module ray with `wait`: what the test has called ready is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready: Callable[[int], bool] = lambda reference: True

    def wait(self, references: Iterable[int], **_: Any) -> tuple[list[int], list[int]]:
        ready = [reference for reference in references if self.is_ready(reference)]
        return ready, [reference for reference in references if reference not in ready]


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Scene:
    """Two samplers and a driver that waits: each wait lets some time pass and finishes calls of samplers at work."""

    def __init__(self, ray: Ray, clock: Clock) -> None:
        self.ray, self.clock = ray, clock
        self.pool = WorkerPool("samplers", "sampler", lambda index: SleepyActor(), 2, RestartBudget(10**6))
        self.sampling = SamplingScheduler(self.pool, StragglerDetector(4.0), {})
        self.turns = Turns(self.sampling, self.pool, self.wait)
        self.sampled: list[Place] = []
        self.held: set[Worker] = set()  # samplers that do not answer
        self.reasons: list[str] = []
        self.on_wait: Callable[[], None] = lambda: None
        self.load()

    def load(self) -> None:
        self.pool.tick(float("inf"))
        for reference in self.pool.references():
            self.pool.take_loaded(reference)

    def submit(self, index: int, stream: Stream = Stream.TRAINING) -> None:
        self.sampling.submit(Task(0, index, 0, (Prompt("a cat"),), (1,), stream=stream), "weights")
        self.sampling.move(self.clock.now)

    def wait(self, pending: tuple[Any, ...], what: str) -> None:
        self.reasons.append(what)
        self.clock.now += SECONDS
        self.on_wait()
        for sampler in [each for each in self.pool.loaded if each.calls and each not in self.held]:
            self.finish(sampler.calls[0])
        self.load()
        self.sampling.move(self.clock.now)

    def finish(self, call: int) -> None:
        task = self.sampling._attempts[call].task
        self.ray.say(call, lambda: TaskReport(task, "fingerprint", 1, 1, SECONDS, ("f",), "a sampler"))
        if done := self.sampling.finished(call, self.clock.now):
            self.sampled.append(done.report.task.place)


def died() -> Any:
    raise RayActorError


def sleeps(worker: Worker) -> int:
    return len(worker.actor.sleep.calls)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    ray, clock = Ray(), Clock()
    for module in (sampling_scheduler, worker_pool, turns):
        monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(sampling_scheduler, "Whereabouts", Nowhere)
    for module in (worker_pool, turns):
        monkeypatch.setattr(module, "time", clock)
    return Scene(ray, clock)


def test_the_learner_begins_when_round_and_evaluation_are_sampled(scene: Scene) -> None:
    for index in range(5):
        scene.submit(index)
    for index in range(3):
        scene.submit(index, Stream.EVALUATION)
    with scene.turns.learner():
        assert len(scene.sampled) == 8, "evaluation is sampled before the learner begins, not beside it"
        assert not any(sampler.calls for sampler in scene.pool.workers)
        assert [sleeps(sampler) for sampler in scene.pool.workers] == [1, 1]
    assert scene.reasons and all("whose GPUs it shares" in reason for reason in scene.reasons)


def test_no_task_begins_in_the_learners_turn_and_waiting_ones_begin_after_it(scene: Scene) -> None:
    with scene.turns.learner():
        scene.submit(0)  # its images were lost while they were scored
        scene.wait((), "the learner is at work")
        assert not any(sampler.calls for sampler in scene.pool.workers)
    scene.sampling.move(scene.clock.now)
    assert [len(sampler.calls) for sampler in scene.pool.workers] == [1, 0]


def test_samplers_work_again_after_an_update_that_failed(scene: Scene) -> None:
    with pytest.raises(RuntimeError, match="trajectories"), scene.turns.learner():
        raise RuntimeError("trajectories were lost")
    scene.submit(0)
    assert scene.pool.workers[0].calls


def straggler_of(scene: Scene) -> tuple[Any, float]:
    """Submit six tasks, and hold the first sampler once half are done. Return it, and when it began its task."""
    for index in range(6):
        scene.submit(index)
    first = scene.pool.workers[0]
    while len(scene.sampled) < 3:
        scene.wait((), "the round")
    scene.held.add(first)
    return first, first.head_since


def test_a_straggler_that_nobody_waits_for_is_replaced_after_twice_its_time(scene: Scene) -> None:
    first, began = straggler_of(scene)
    with scene.turns.learner():
        assert len(scene.sampled) == 6 and first.gone and first not in scene.pool.workers
        assert not any(sampler.calls for sampler in scene.pool.workers)
    assert 2 * 4 * SECONDS < scene.clock.now - began <= 2 * 4 * SECONDS + 2 * SECONDS, "4 × the median, twice"


def test_a_straggler_that_ends_in_time_is_waited_for(scene: Scene) -> None:
    first, began = straggler_of(scene)
    scene.on_wait = lambda: scene.held.discard(first) if scene.clock.now - began > 6 * SECONDS else None
    with scene.turns.learner():
        assert len(scene.sampled) == 6 and not first.gone and not first.calls
        assert sleeps(first) == 1


def test_a_sampler_that_died_between_turns_is_replaced(scene: Scene) -> None:
    first, second = scene.pool.workers
    deaths = []
    scene.pool.on_death = deaths.append
    remote = first.actor.sleep.remote

    def dying() -> int:
        scene.ray.say(reference := remote(), died)
        return reference

    first.actor.sleep.remote = dying
    with scene.turns.learner():
        assert first.gone and not second.gone and sleeps(second) == 1
    assert [death.at for death in deaths] == ["at the end of its turn"]
    scene.load()
    assert len(scene.pool.loaded) == 2


def test_a_sampler_that_does_not_return_its_memory_is_replaced(scene: Scene) -> None:
    first, second = scene.pool.workers
    scene.ray.is_ready = lambda reference: reference not in first.actor.sleep.calls
    with scene.turns.learner():
        assert first.gone and not second.gone
    assert SLEEP_SECONDS < scene.clock.now <= SLEEP_SECONDS + 2 * SECONDS
