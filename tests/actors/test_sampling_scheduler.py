"""The sampling scheduler takes over the tasks that a search through all attempts finds, after any history."""

import random

import pytest
from ray.exceptions import RayActorError

from ray_ddpo.actors.rollouts import sampling_scheduler as sampling
from ray_ddpo.actors.rollouts import worker_pool
from ray_ddpo.actors.rollouts.sampling_scheduler import SamplingScheduler
from ray_ddpo.actors.rollouts.stragglers import StragglerDetector
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.schedule import Place, Stream, Task
from ray_ddpo.common.trajectory import TaskReport
from tests.actors.stand_in_actors import Actor, Answers, Nowhere

ACTS = ("submit", "submit", "answer", "answer", "answer", "die", "slow", "forgotten", "move")


def searched(sampling: SamplingScheduler) -> Place | None:
    """Search all attempts for the first task that waits behind another one on a sampler and has no other attempt."""
    behind = [call for sampler in sampling._samplers.loaded for call in sampler.calls[1:]]
    places = [attempt.task.place for attempt in sampling._attempts.values()]
    waiting = [sampling._attempts[call].task.place for call in behind]
    return min((place for place in waiting if place in sampling._open and places.count(place) == 1), default=None)


class Driver:
    """What befalls a sampling, one thing after the other."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.pool = WorkerPool("samplers", "sampler", lambda index: Actor(), 3, RestartBudget(10**6))
        self.sampling = SamplingScheduler(self.pool, StragglerDetector(4.0), {})
        self.submitted = 0
        self.sampled: list[Place] = []
        self.load()

    def load(self) -> None:
        self.pool.tick(float("inf"))
        for reference in self.pool.references():
            self.pool.take_loaded(reference)

    def act(self, what: str, number: int) -> None:
        held = [sampler for sampler in self.pool.loaded if sampler.calls]
        if what == "submit":
            stream = Stream.EVALUATION if number % 4 == 0 else Stream.TRAINING
            task = Task(number % 3, self.submitted, 0, (Prompt("a cat"),), (1,), stream=stream)
            self.sampling.submit(task, "weights")
            self.submitted += 1
        elif what == "slow" and held:
            sampler = held[number % len(held)]
            sampler.suspect = True
            for call in sampler.calls:
                self.sampling._again(self.sampling._attempts[call].task, "straggler")
        elif what in ("answer", "die", "forgotten") and held:
            self.end(held[number % len(held)].calls[0], what)
        self.sampling.move(0.0)

    def end(self, call: int, what: str) -> None:
        task = self.sampling._attempts[call].task
        self.answers.say(call, {"answer": lambda: report(task), "die": died, "forgotten": lambda: None}[what])
        done = self.sampling.finished(call, 0.0)
        if done:
            self.sampled.append(done.report.task.place)
        self.load()


def report(task: Task) -> TaskReport:
    return TaskReport(task, "", 1, 0, 0.0)


def died() -> None:
    raise RayActorError


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    given = Answers()
    for module in (sampling, worker_pool):
        monkeypatch.setattr(module, "ray", given)
    monkeypatch.setattr(sampling, "Whereabouts", Nowhere)
    return given


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Compare every task that is taken over with the search."""
    found: list[Place] = []
    waiting_behind = SamplingScheduler._waiting_behind

    def watched(self: SamplingScheduler) -> sampling.TaskRequest | None:
        expected = searched(self)
        asked = waiting_behind(self)
        assert (asked.task.place if asked else None) == expected
        found.extend([asked.task.place] if asked else [])
        return asked

    monkeypatch.setattr(SamplingScheduler, "_waiting_behind", watched)
    return found


@pytest.mark.rotated(every=7)
@pytest.mark.parametrize("seed", range(40))
def test_every_task_is_sampled_once_whatever_happens_to_the_samplers(
    answers: Answers, taken_over: list[Place], seed: int
) -> None:
    chance, driver = random.Random(seed), Driver(answers)
    for _ in range(80):
        driver.act(chance.choice(ACTS), chance.randrange(20))
    for _ in range(10 * (driver.submitted + 1)):
        driver.act("answer", 0)
    assert len(driver.sampled) == len(set(driver.sampled)) == driver.submitted
    assert driver.sampling.inflight() == 0 and driver.sampling.waiting_for() == []


def test_an_idle_sampler_takes_over_what_waits_behind_another_task(answers: Answers, taken_over: list[Place]) -> None:
    driver = Driver(answers)
    for _ in range(4):  # three in hand, one behind the first
        driver.act("submit", 1)
    (behind,) = [sampler.calls[1] for sampler in driver.pool.loaded if len(sampler.calls) > 1]
    place = driver.sampling._attempts[behind].task.place
    driver.end(driver.pool.loaded[1].calls[0], "answer")
    driver.sampling.move(0.0)
    assert taken_over == [place]
