"""A learner rank and a sampler on each GPU, in turns: the bits of the run, deaths, their places, and a lost node."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_ddpo.actors.rollouts.turns import Turns
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.driver.colocated_pairs import Pairs, refuse_too_many_pairs
from ray_ddpo.deploy.driver.workers import place_options
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.train import run_training
from tests.conftest import MARK
from tests.failure_page import assert_documented
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, in_turn, processes_of, wait_until
from tests.system.nodes import local_nodes

pytestmark = pytest.mark.system
ROUNDS = 4


def recipe_of(tables: dict, name: str, pairs: int = 2, colocated: bool = True, **changes: Any) -> Recipe:
    """Four tasks a round, an evaluation after every second round."""
    role = {"num_cpus": 0.5}
    evaluation = {"every": 2, "images": 4, "batch_size": 2}
    learner = {**tables["learner"], **role, "world_size": pairs, "colocated": colocated, **changes.pop("learner", {})}
    samplers = {**role, "count": pairs, **changes.pop("samplers", {})}
    sampling = {**tables["sampling"], "batches_per_round": 4}
    tables = {**tables, "rounds": ROUNDS, "evaluation": evaluation, "sampling": sampling, "samplers": samplers}
    return Recipe.parse({**tables, "name": name, "learner": learner, **changes})


def metrics_of(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()]


def evaluated(recipe: Recipe) -> dict[int, list[float]]:
    """The scores of the held-out images of versions 0, 2 and 4."""
    log = EvalLog(Storage(recipe.run_path()))
    return {version: log.scores(version)["jpeg_compressibility"].tolist() for version in (0, 2, 4)}


def kill(role: str, place: int) -> None:
    processes = processes_of(role)
    assert len(processes) == 2
    os.kill(processes[place].pid, signal.SIGKILL)


def test_pairs_give_the_bits_of_separate_roles_after_deaths_of_both_and_a_resume(tables: dict, cluster: None) -> None:
    apart, pairs = recipe_of(tables, "apart", colocated=False), recipe_of(tables, "pairs", checkpoint={"every": 1})
    expected, run = final_fingerprint(apart), Path(pairs.run_path())
    deaths = in_turn(
        at_round(run, 1, lambda: kill("ray::Sampler", 1)),
        at_round(run, 2, lambda: kill("ray::Learner", 1)),
    )
    with beside(deaths):
        run_training(pairs.model_copy(update={"rounds": ROUNDS - 1}))
    assert final_fingerprint(pairs, resume=True) == expected
    assert evaluated(pairs) == evaluated(apart)
    restarts = [
        sum(each.get(f"actor_restarts/{role}", 0) for each in metrics_of(pairs)) for role in ("sampler", "learner")
    ]
    assert restarts == [1, 1]


def bundles(recipe: Recipe) -> dict[str, list[str]]:
    """The bundles that a run's rank and sampler are in, by Ray's name for the CPUs that they have there."""
    found = {}
    for role in ("learner-0", "sampler-0"):
        call = ray.get_actor(f"{recipe.name}/{role}").__ray_call__
        names = ray.get(call.remote(lambda self: list(ray._private.worker.global_worker.core_worker.resource_ids())))
        found[role] = [name for name in names if name.startswith("CPU_group_0_")]
    return found


def test_one_pair_gives_the_bits_of_one_process(tables: dict, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, learner_turn = [], Turns.learner
    one = recipe_of(tables, "one", pairs=1)

    def noted(turns: Turns) -> AbstractContextManager[None]:
        begun.append(bundles(one))
        return learner_turn(turns)

    monkeypatch.setattr(Turns, "learner", noted)
    in_one_process = final_fingerprint(recipe_of(tables, "serial", pairs=1), serial=True)
    assert not begun and final_fingerprint(one) == in_one_process
    assert len(begun) == ROUNDS, "every update is a turn"
    assert len(begun[0]["learner-0"]) == 1 and all(len({*map(tuple, each.values())}) == 1 for each in begun)
    assert final_fingerprint(recipe_of(tables, "apart", pairs=1, colocated=False), serial=True) == in_one_process


def test_pairs_that_do_not_fit_are_refused_at_once(tables: dict, cluster: None) -> None:
    with pytest.raises(ValueError) as error:
        refuse_too_many_pairs(recipe_of(tables, "many", samplers={"resources": {MARK: 1}}))
    assert "2 pairs of a learner rank and a sampler (CPU 1, of_the_tests 1 each)" in str(error.value)
    gpus = {"learner": {"num_gpus": 0.6}, "samplers": {"num_gpus": 0.3}}
    with pytest.raises(ValueError) as error:
        refuse_too_many_pairs(recipe_of(tables, "gpus", **gpus))
    assert_documented("`learner.colocated` with more pairs than GPUs", 2, f"ddpo train: {error.value}")


def test_pairs_without_a_place_are_refused_after_the_time_to_be_ready(tables: dict, cluster: None) -> None:
    checked: list[int] = []
    pairs = Pairs(recipe_of(tables, "nowhere", samplers={"resources": {"nowhere": 1}}))
    with pytest.raises(ValueError) as error:
        pairs.wait(1.0, lambda: checked.append(1))
    assert_documented("`learner.colocated` on a cluster without room for the pairs", 2, f"ddpo train: {error.value}")
    assert checked, "signals are noticed meanwhile"


def part_of_a_pair() -> type:
    """A rank or a sampler that only has a place. It goes to its process by value, without the imports of this module."""

    class Part:
        def place(self) -> dict[str, list[tuple[int, float]]]:
            """Which GPU it has, and how much of it, by the bundle's name for it."""
            ids = ray._private.worker.global_worker.core_worker.resource_ids()
            return {
                name: amount for name, amount in ids.items() if name.startswith("GPU_group_") and name.count("_") == 3
            }

        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    return Part


@contextmanager
def attached(cluster: Cluster) -> Iterator[None]:
    """Attach this process to a cluster, instead of the one that it has."""
    ray.shutdown()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def actor(table: RoleTable, options: dict[str, Any]) -> Any:
    return ray.remote(**place_options(table), **options)(part_of_a_pair()).remote()


def gpu_of(part: Any) -> tuple[int, float]:
    (((gpu, share),),) = ray.get(part.place.remote(), timeout=120).values()
    return gpu, share


def test_each_gpu_has_one_rank_and_one_sampler_also_after_all_were_replaced(tables: dict) -> None:
    roles = {"learner": {"num_gpus": 0.55, "num_cpus": 0.1}, "samplers": {"num_gpus": 0.35, "num_cpus": 0.1}}
    recipe = recipe_of(tables, "four", pairs=4, **roles)
    with local_nodes() as nodes, attached(nodes):
        nodes.add_node(num_cpus=4, num_gpus=4, object_store_memory=100_000_000)  # so it says; they are never used
        pairs = Pairs(recipe)
        pairs.wait(60, lambda: None)
        ranks = [actor(recipe.learner, pairs.of_rank(rank)) for rank in range(4)]
        samplers = {number: actor(recipe.samplers, pairs.of_sampler(number)) for number in range(4)}
        before = [gpu_of(rank) for rank in ranks]
        assert sorted(before) == [(gpu, 0.55) for gpu in range(4)]
        assert sorted(gpu_of(sampler) for sampler in samplers.values()) == [(gpu, 0.35) for gpu in range(4)]
        reward_worker = ray.remote(num_gpus=0.1, num_cpus=0.1)(part_of_a_pair()).remote()
        assert ray.get(reward_worker.node.remote(), timeout=120), "what the pairs leave is there for reward workers"

        lost = {number: gpu_of(samplers[number])[0] for number in (3, 1)}
        for part in (*ranks, *(samplers.pop(number) for number in lost)):
            ray.kill(part)
        for number in lost:
            pairs.free(number)
        samplers |= {number: actor(recipe.samplers, pairs.of_sampler(number)) for number in (4, 5)}
        ranks = [actor(recipe.learner, pairs.of_rank(rank)) for rank in range(4)]
        assert [gpu_of(rank) for rank in ranks] == before, "a rank comes back to its GPU"
        assert {gpu_of(samplers[number])[0] for number in (4, 5)} == set(lost.values())
        pairs.close()


def nodes_of_parts(parts: list[Any]) -> list[str]:
    return ray.get([part.node.remote() for part in parts], timeout=120)


def test_the_bundle_of_a_lost_node_moves_to_a_spare_one(tables: dict) -> None:
    """Three nodes have room for one pair each, and there are two pairs."""
    recipe = recipe_of(tables, "moved", samplers={"resources": {"place": 0.5}}, learner={"resources": {"place": 0.5}})
    with local_nodes() as cluster:
        nodes = [cluster.add_node(num_cpus=1, resources={"place": 1}, object_store_memory=80_000_000) for _ in range(3)]
        with attached(cluster):
            pairs = Pairs(recipe)
            pairs.wait(60, lambda: None)
            where = nodes_of_parts([actor(recipe.learner, pairs.of_rank(rank)) for rank in range(2)])
            samplers = [actor(recipe.samplers, pairs.of_sampler(number)) for number in range(2)]
            assert nodes_of_parts(samplers) == where and len(set(where)) == 2

            (lost,) = [node for node in nodes if node.node_id == where[1]]
            cluster.remove_node(lost, allow_graceful=False)
            wait_until(
                lambda: where[1] not in [each["NodeID"] for each in ray.nodes() if each["Alive"]], "the loss", 60
            )
            pairs.free(1)
            again = [actor(recipe.learner, pairs.of_rank(1)), actor(recipe.samplers, pairs.of_sampler(2))]
            (spare,) = {node.node_id for node in nodes} - set(where)
            assert nodes_of_parts(again) == [spare, spare]
            assert nodes_of_parts(samplers[:1]) == where[:1], "the other pair stays where it is"
