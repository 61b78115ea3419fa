"""The books of tasks that wait for their scores: each gets them once, in order, whatever befalls the reward workers."""

import random

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from ray_ddpo.actors.rewards.failure import ScoringFailed
from ray_ddpo.actors.rollouts import scoring_scheduler as scoring
from ray_ddpo.actors.rollouts import worker_pool
from ray_ddpo.actors.rollouts.sampling_scheduler import SampledTask
from ray_ddpo.actors.rollouts.scoring_pools import ScoringPools
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool, ScoringScheduler
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable
from ray_ddpo.common.schedule import Place, Task
from ray_ddpo.common.trajectory import Scores, TaskReport
from tests.actors.stand_in_actors import Actor, Answers, Nowhere

ENDS = ("answer", "answer", "answer", "answer", "fail", "die", "lose", "not finite")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    given = Answers()
    for module in (scoring, worker_pool):
        monkeypatch.setattr(module, "ray", given)
    monkeypatch.setattr(scoring, "Whereabouts", Nowhere)
    return given


class Driver:
    """A driver of a pool's scoring, by events, with a clock that advances a second at a time."""

    def __init__(self, answers: Answers, independent: bool, workers: int = 2) -> None:
        self.answers = answers
        self.pool = WorkerPool("reward_workers", "reward_worker", lambda index: Actor(), workers, RestartBudget(10**6))
        table = RewardPoolTable(batch_size=4, attempts=100, timeout_seconds=1e9)
        self.scoring = ScoringScheduler(ScoringPool(self.pool, ("a",), table, independent), {})
        self.now = 0.0
        self.submitted = 0
        self.scored: list[Place] = []
        self.aside: list[dict[int, str]] = []

    def submit(self, round_index: int, images: int) -> None:
        task = Task(round_index, self.submitted, 0, (Prompt("a cat"),) * images, tuple(range(images)))
        self.scoring.submit(SampledTask(TaskReport(task, "", 1, 0, 0.0), None, None, None))
        self.submitted += 1

    def move(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.pool.tick(float("inf"))
        for reference in self.pool.references():
            self.pool.take_loaded(reference)
        self.scoring.move(self.now)

    def end(self, reference: int, how: str) -> None:
        call = self.scoring._calls[reference]
        self.answers.say(reference, lambda: answer(call, how))
        outcome = self.scoring.finished(reference, self.now)
        self.aside += [scores.dropped for _, scores in outcome.scored]
        self.scored += [sampled.report.task.place for sampled, _ in outcome.scored]
        for sampled in outcome.lost:
            self.scoring.submit(sampled)


def test_a_task_without_any_image_is_done_without_a_reward_worker(answers: Answers) -> None:
    workers = Driver(answers, independent=True).pool
    table = RewardPoolTable(batch_size=4, attempts=100)
    pools = ScoringPools(tuple(ScoringPool(workers, (name,), table, True) for name in ("a", "b")), {})
    task = Task(0, 0, 0, (Prompt("a cat"),) * 2, (1, 2))
    report = TaskReport(task, "", 1, 0, 0.0, dropped={0: "NaN", 1: "NaN"})
    ((_, scores),) = pools.submit(SampledTask(report, None, None, None)).scored
    assert scores.dropped == report.dropped and np.isnan(list(scores.rewards.values())).all()
    pools.move(0.0)
    assert scores.rewards.keys() == {"a", "b"} and not pools.references()


def answer(call: scoring._Call, how: str) -> Scores | list[Scores]:
    """Return the result of a reward worker."""
    if how == "fail":
        raise RayTaskError("score", "", ScoringFailed("it failed"))
    if how == "poison":
        raise RayTaskError("score", "", ScoringFailed("CUDA error", "", poisoned=True))
    if how == "lose":
        raise RayTaskError("score", "", ObjectLostError("", "", ""))
    if how == "die":
        raise RayActorError
    values = [np.zeros(batch.size, np.float32) for _, batch in call.parts]
    bad = [{0: "nan"} if how == "not finite" else {} for _ in values]
    scores = [Scores({"a": value}, 0.0, reasons) for value, reasons in zip(values, bad, strict=True)]
    return scores if len(scores) > 1 else scores[0]


@pytest.mark.rotated(every=7)
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_every_task_is_scored_once_whatever_happens_to_the_reward_workers(
    answers: Answers, seed: int, independent: bool
) -> None:
    chance, driver = random.Random(seed), Driver(answers, independent)
    for _ in range(60):
        if chance.random() < 0.5:
            driver.submit(chance.randrange(3), chance.choice((1, 2, 3, 6, 9)))
        driver.move(chance.choice((0.1, 1.0)))
        for reference in chance.sample(driver.scoring.references(), min(2, len(driver.scoring.references()))):
            if driver.scoring.holds(reference):
                driver.end(reference, chance.choice(ENDS))
    for _ in range(30 * driver.submitted):
        driver.move(40.0)
        for reference in driver.scoring.references():
            driver.end(reference, "answer")
    assert sorted(driver.scored) == sorted(set(driver.scored)) and len(driver.scored) == driver.submitted
    assert driver.scoring.waiting_for() == []


def test_earlier_tasks_come_first_and_a_task_that_failed_waits_for_its_time(answers: Answers) -> None:
    driver = Driver(answers, independent=False, workers=1)
    for round_index in (2, 0, 1):
        driver.submit(round_index, 4)
    driver.move()
    first, _ = driver.scoring.references()
    in_hands = [call.parts[0][0].place[0] for call in driver.scoring._calls.values()]
    assert in_hands == [0, 1]
    driver.end(first, "fail")
    driver.move(0.1)  # the pause is half a second
    assert [call.parts[0][0].place[0] for call in driver.scoring._calls.values()] == [1, 2]
    driver.end(driver.scoring.references()[0], "answer")
    driver.move(0.5)
    assert [call.parts[0][0].place[0] for call in driver.scoring._calls.values()] == [2, 0]


def test_what_fits_goes_in_one_batch_where_batches_do_not_matter(answers: Answers) -> None:
    driver = Driver(answers, independent=True, workers=1)
    for images in (1, 2, 3):
        driver.submit(0, images)
    driver.move()
    sizes = [[batch.size for _, batch in call.parts] for call in driver.scoring._calls.values()]
    assert sizes == [[1, 2], [3]]


def test_a_worker_whose_gpu_is_of_no_use_any_more_is_replaced_and_its_image_found(answers: Answers) -> None:
    driver = Driver(answers, independent=False, workers=1)
    driver.submit(0, 4)
    killer, seen, ends = 2, set(), []
    while not driver.scored:
        driver.move(40.0)
        seen |= {worker.index for worker in driver.pool.workers}
        for reference in driver.scoring.references():
            ((_, batch),) = driver.scoring._calls[reference].parts
            driver.scoring._whereabouts.row = killer
            ends.append("poison" if batch.first <= killer < batch.last else "answer")
            driver.end(reference, ends[-1])
    assert ends.count("poison") == 4 and len(seen) == 5
    assert driver.aside == [{killer: "the reward worker that scored it died, 2 times over it alone"}]


def test_only_the_running_call_counts_as_a_death_over_its_images(answers: Answers) -> None:
    driver = Driver(answers, independent=False, workers=1)
    for _ in range(2):
        driver.submit(0, 4)
    for _ in range(2):
        driver.move(40.0)
        first, second = driver.scoring.references()
        driver.end(second, "die")  # Ray may tell of this one first
    deaths = [task.job.waiting[0] for task in driver.scoring._open.values()]
    assert [(batch.deaths, batch.one_by_one) for batch in deaths] == [(0, True), (0, False)]
