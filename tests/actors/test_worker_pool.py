"""The pool's books: whoever `free` finds is whom a search through all workers finds, whatever came before."""

import random

import pytest

from ray_ddpo.actors.rollouts import worker_pool
from ray_ddpo.actors.rollouts.worker_pool import TASKS_AHEAD, RestartBudget, Worker, WorkerPool
from tests.actors.stand_in_actors import Actor, Answers

ACTS = ("load", "give", "give", "answer", "suspect", "lose", "grow", "shrink")


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    given = Answers()
    monkeypatch.setattr(worker_pool, "ray", given)
    return given


def searched(pool: WorkerPool, avoid: Worker | None = None) -> Worker | None:
    able = [each for each in pool.workers if each.loading is None and not each.retiring and not each.suspect]
    able = [each for each in able if len(each.calls) < TASKS_AHEAD]
    others = [each for each in able if each is not avoid]
    return min(others or able, key=lambda each: (len(each.calls), each.index), default=None)


def act(pool: WorkerPool, what: str, number: int) -> None:
    """Apply an event to a pool; `number` selects the worker."""
    loaded = pool.loaded
    worker = loaded[number % len(loaded)] if loaded else None
    match what:
        case "load" if pool.references():
            assert pool.take_loaded(pool.references()[number % len(pool.references())])
        case "give" if chosen := pool.free():
            pool.give(chosen, object(), float(number))
        case "answer" if worker and worker.calls:
            pool.answered(worker, worker.calls[0], float(number))
        case "suspect" if worker and worker.calls:
            worker.suspect = True
        case "lose" if worker:
            pool.lost(worker, "it died")
            pool.tick(float("inf"))
        case "grow":
            pool.scale(pool.wanted + number % 3)
        case "shrink":
            pool.scale(max(1, pool.wanted - number % 3))


@pytest.mark.parametrize("seed", range(40))
def test_the_free_worker_is_the_one_with_the_fewest_calls(seed: int) -> None:
    chance = random.Random(seed)
    pool = WorkerPool("samplers", "sampler", lambda index: Actor(), 4, RestartBudget(10**6))
    for _ in range(80):
        act(pool, chance.choice(ACTS), chance.randrange(20))
        assert pool.free() is searched(pool)
        for worker in pool.workers:
            assert pool.free(avoid=worker) is searched(pool, worker)


def test_what_was_loading_is_loaded_once() -> None:
    pool = WorkerPool("samplers", "sampler", lambda index: Actor(), 2, RestartBudget(0))
    first, second = pool.references()
    assert pool.take_loaded(second) and not pool.take_loaded(second) and pool.references() == [first]


def test_the_driver_gets_what_every_worker_has_loaded_and_may_refuse_it(answers: Answers) -> None:
    told = []

    def on_loaded(who: str, loaded: object) -> None:
        told.append((who, loaded))
        if loaded == "another file":
            raise ValueError(f"{who} has another file")

    pool = WorkerPool("samplers", "sampler", lambda index: Actor(), 1, RestartBudget(9))
    pool.on_loaded = on_loaded
    first = pool.references()[0]
    answers.say(first, lambda: "the file")
    assert pool.take_loaded(first)
    pool.scale(2)
    (later,) = pool.references()
    answers.say(later, lambda: "another file")
    with pytest.raises(ValueError, match="sampler 1 has another file"):
        pool.take_loaded(later)
    assert told == [("sampler 0", "the file"), ("sampler 1", "another file")]
