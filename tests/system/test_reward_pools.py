"""Reward workers as pools on Ray: rewards on workers of their own, batches made of several tasks, scaling by name."""

from collections.abc import Iterator

import numpy as np
import pytest
import ray

from ray_ddpo import cli
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rollouts.sampling_scheduler import SampledTask
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool, ScoringScheduler
from ray_ddpo.actors.rollouts.worker_pool import RestartBudget, WorkerPool
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import ImageBatch, TaskReport
from tests.system.conftest import final_fingerprint

BRIGHTNESS = {"name": "function", "path": "tests.user_functions:brightness", "independent": True, "weight": 0.01}


def with_rewards(tables: dict, name: str, *rewards: dict) -> Recipe:
    one_reward = {key: value for key, value in tables.items() if key != "reward"}
    return Recipe.parse({**one_reward, "name": name, "rewards": list(rewards), "aggregation": {"kind": "z_score"}})


@pytest.mark.system
def test_rewards_on_workers_of_their_own_lead_to_the_bits_of_one_process(tables: dict, cluster: None) -> None:
    jpeg = {"name": "jpeg_compressibility"}
    apart = {**jpeg, "workers": {"count": 2, "batch_size": 3, "num_cpus": 0.5}}
    shared = final_fingerprint(with_rewards(tables, "shared", jpeg, BRIGHTNESS), serial=True)
    assert final_fingerprint(with_rewards(tables, "serial", apart, BRIGHTNESS), serial=True) == shared
    assert final_fingerprint(with_rewards(tables, "ray", apart, BRIGHTNESS)) == shared
    alone = final_fingerprint(with_rewards(tables, "alone", jpeg), serial=True)
    assert alone != shared, "the second reward counts"


@pytest.fixture
def workers(cluster: None) -> Iterator[WorkerPool]:
    reward = build(REWARDS, {key: value for key, value in BRIGHTNESS.items() if key != "weight"}, "reward")
    table, actor = (
        RewardPoolTable(batch_size=8),
        ray.remote(num_cpus=0.1, concurrency_groups={"health": 1})(RewardWorker),
    )
    pool = WorkerPool(
        "reward_workers",
        "reward_worker",
        lambda _: actor.remote({"b": reward}, table, RuntimeTable()),
        1,
        RestartBudget(0),
    )
    assert pool.take_loaded(pool.references()[0])
    yield pool
    pool.close()


def sampled(index: int, levels: list[int]) -> SampledTask:
    prompts = tuple(Prompt("cat") for _ in levels)
    images = ImageBatch(np.stack([np.full((4, 4, 3), level, np.uint8) for level in levels]), prompts)
    task = Task(0, index, 0, prompts, tuple(range(len(levels))))
    return SampledTask(TaskReport(task, "f", 1, 1, 1.0), None, ray.put(images), None)


@pytest.mark.system
@pytest.mark.parametrize(("independent", "calls"), [(True, 1), (False, 3)])
def test_a_reward_independent_of_its_batch_scores_waiting_tasks_as_one_batch(
    workers: WorkerPool, independent: bool, calls: int
) -> None:
    scoring = ScoringScheduler(ScoringPool(workers, ("b",), RewardPoolTable(batch_size=8), independent), {})
    for index in range(3):
        scoring.submit(sampled(index, [10 * index, 10 * index + 1]))
    scores, made = {}, 0
    scoring.move(0.0)
    while scoring.references():
        made += 1
        reference = scoring.references()[0]
        ray.wait([reference])
        for done, of_task in scoring.finished(reference, 0.0).scored:
            scores[done.report.task.index] = of_task.rewards["b"].tolist()
        scoring.move(0.0)
    assert made == calls and scores == {0: [0, 1], 1: [10, 11], 2: [20, 21]}


def test_scale_names_the_pools_there_are(tables: dict, capsys: pytest.CaptureFixture) -> None:
    recipe = with_rewards(tables, "done", {"name": "jpeg_compressibility", "workers": {"max": 4}})
    final_fingerprint(recipe, serial=True)
    for words, text in (
        (["2"], "this run has no reward_workers: it has samplers, reward_workers.jpeg_compressibility"),
        (["jpeg_compressibility=9"], "reward_workers.jpeg_compressibility is 9: it must lie between"),
        (
            ["jpeg_compressibility=two"],
            "--reward-workers is 'jpeg_compressibility=two': it must be a number, or NAME=N",
        ),
        (["jpeg_compressibility=3"], "no process runs"),
    ):
        assert cli.main(["scale", recipe.run_path(), "--reward-workers", *words]) == 2
        assert text in capsys.readouterr().err
