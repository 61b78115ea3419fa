"""Resources of actors and memory of roles, with numbers by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.doctor.checks import Finding
from ray_ddpo.deploy.commands.doctor.resources import (
    LIBRARY_BYTES,
    FreeMemory,
    cores_finding,
    memory_findings,
    place_findings,
    roles_of,
)
from ray_ddpo.deploy.commands.plan.numbers import Plan, plan_of

GIGABYTE = 10**9


def with_roles(tables: dict, **roles: dict) -> Recipe:
    return Recipe.parse({**tables, **{name: {**tables.get(name, {}), **keys} for name, keys in roles.items()}})


def by_subject(findings: object) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_fewer_samplers_than_asked_for_are_a_warning_with_how_many_of_how_many(tables: dict) -> None:
    recipe = with_roles(tables, samplers={"count": 4, "num_gpus": 1})
    found = by_subject(place_findings(roles_of(recipe), [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}]))
    assert (found["learner"].level, found["reward_workers"].level) == ("ok", "ok")
    assert found["samplers"].level == "warning" and found["samplers"].found.startswith("3 of 4 have a place")
    assert "lacks GPU (at most 0 free)" in found["samplers"].found and "samplers.count" in found["samplers"].advice


def test_a_role_without_enough_resources_is_a_fault_that_names_them(tables: dict) -> None:
    recipe = with_roles(tables, samplers={"resources": {"sampler": 1}}, reward_workers={"count": 3, "min": 3})
    found = by_subject(place_findings(roles_of(recipe), [{"CPU": 3}]))
    assert found["samplers"].level == "fault" and "lacks sampler (at most 0 free)" in found["samplers"].found
    assert found["reward_workers"].level == "fault" and found["reward_workers"].found.startswith("2 of 3")


def test_a_reward_with_workers_of_its_own_has_a_place_of_its_own(tables: dict) -> None:
    recipe = with_roles(tables, reward={"workers": {"count": 2, "num_gpus": 0.5, "resources": {"scorer": 1}}})
    found = by_subject(place_findings(roles_of(recipe), [{"CPU": 4}, {"CPU": 1, "GPU": 1, "scorer": 1}]))
    assert "reward_workers" not in found
    finding = found["reward_workers.jpeg_compressibility"]
    assert finding.level == "warning" and finding.found.startswith("1 of 2 have a place")
    assert "lacks scorer (at most 0 free)" in finding.found


def test_an_actor_has_its_place_on_one_node_not_on_a_sum_of_nodes(tables: dict) -> None:
    recipe = with_roles(tables, learner={"num_cpus": 2, "num_gpus": 1})
    found = by_subject(place_findings(roles_of(recipe), [{"CPU": 4}, {"CPU": 1, "GPU": 1}]))
    assert "lacks a single node with all of it free" in found["learner"].found
    two = with_roles(tables, learner={"num_gpus": 2})
    found = by_subject(place_findings(roles_of(two), [{"CPU": 4, "GPU": 1}] * 2))
    assert "GPU (at most 1 free)" in found["learner"].found


def test_every_rank_of_the_learner_needs_a_place_its_cores_and_its_memory(tables: dict, numbers: Plan) -> None:
    recipe = with_roles(tables, learner={"world_size": 2, "num_gpus": 1, "num_cpus": 4})
    nodes = [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    assert by_subject(place_findings(roles_of(recipe), nodes))["learner"].found.startswith("2 of 2 have a place")
    finding = by_subject(place_findings(roles_of(recipe), nodes[:1]))["learner"]
    assert finding.level == "fault" and finding.found.startswith("1 of 2 have a place")
    assert "lacks GPU (at most 0 free)" in finding.found
    assert "8 CPUs" in cores_finding(recipe, 2).found
    machine = FreeMemory(64 * GIGABYTE, (10 * GIGABYTE, 10 * GIGABYTE))
    assert "8.60 GB on the fullest" in by_subject(memory_findings(recipe, numbers, machine))["GPU memory"].found
    on_cpu = with_roles(tables, learner={"world_size": 2})
    found = by_subject(memory_findings(on_cpu, numbers, machine))["memory"].found
    assert found.startswith(f"{2 * 8 + 4 + 1 + 5 * 0.45:.2f} GB for 5 processes")


def test_three_tenths_six_tenths_and_a_tenth_fill_one_gpu(tables: dict) -> None:
    roles = {"learner": {"num_gpus": 0.6}, "samplers": {"num_gpus": 0.3}, "reward_workers": {"num_gpus": 0.1}}
    found = by_subject(place_findings(roles_of(with_roles(tables, **roles)), [{"CPU": 3, "GPU": 1}]))
    assert {finding.level for finding in found.values()} == {"ok"}


def test_a_kind_of_accelerator_is_asked_for_by_its_name(tables: dict) -> None:
    recipe = with_roles(tables, learner={"num_gpus": 1, "accelerator_type": "A100"})
    node = {"CPU": 4, "GPU": 1}
    assert (
        by_subject(place_findings(roles_of(recipe), [{**node, "accelerator_type:H100": 1}]))["learner"].level == "fault"
    )
    assert by_subject(place_findings(roles_of(recipe), [{**node, "accelerator_type:A100": 1}]))["learner"].level == "ok"


def test_cores_are_shared_in_turns_at_lag_0_and_at_once_with_lag(tables: dict) -> None:
    recipe = Recipe.parse(tables)  # one CPU for each of the three roles
    assert cores_finding(recipe, 2).level == "ok"
    finding = cores_finding(recipe.model_copy(update={"max_policy_lag": 1}), 2)
    assert finding.level == "warning" and "3 CPUs" in finding.found


def colocated(tables: dict, pairs: int, **changes: dict) -> Recipe:
    roles = {"learner": {"world_size": pairs, "colocated": True, "num_gpus": 0.5}, "samplers": {"num_gpus": 0.4}}
    roles["samplers"]["count"] = pairs
    return with_roles(tables, **{**roles, **changes})


def test_a_pair_has_one_place_and_leaves_the_rest_of_its_gpu(tables: dict) -> None:
    recipe = colocated(tables, 2, reward_workers={"count": 3, "num_gpus": 0.1})
    found = by_subject(place_findings(roles_of(recipe), [{"CPU": 8, "GPU": 2}]))
    assert "samplers" not in found and "learner" not in found
    assert found["learner+sampler"].found == "2 of 2 have a place; each asks for CPU 2, GPU 0.9"
    assert found["reward_workers"].found.startswith("2 of 3 have a place"), "a tenth of each GPU is left"


def test_no_two_pairs_are_on_one_gpu_whatever_they_ask_for(tables: dict) -> None:
    small = {"learner": {"world_size": 4, "colocated": True, "num_gpus": 0.3}}
    recipe = colocated(tables, 4, **small, samplers={"count": 4, "num_gpus": 0.3})
    finding = by_subject(place_findings(roles_of(recipe), [{"CPU": 16, "GPU": 3}]))["learner+sampler"]
    assert finding.level == "fault" and finding.found.startswith("3 of 4 have a place")
    assert "asks for CPU 2, GPU 0.6, and lacks GPU (at most 0 free)" in finding.found
    across = [{"CPU": 4, "GPU": 1}, {"CPU": 8, "GPU": 3}]
    assert by_subject(place_findings(roles_of(recipe), across))["learner+sampler"].level == "ok"


def test_a_pairs_two_processes_share_a_gpus_memory_in_turns(tables: dict, numbers: Plan) -> None:
    recipe, machine = colocated(tables, 2), FreeMemory(64 * GIGABYTE, (10 * GIGABYTE, 10 * GIGABYTE))
    sizes = replace(numbers.sizes, learner=PeakBytes(3e9, 1e9), sampling=PeakBytes(2e9, 1e9))
    pair = replace(numbers, sizes=sizes)  # 3 + 2 GB of weights and states, beside 5 GB or 2 GB
    assert pair.pair_bytes == 10 * GIGABYTE
    found = by_subject(memory_findings(recipe, pair, machine))
    assert "11.20 GB on the fullest GPU" in found["GPU memory"].found, "with CUDA's own of two processes"
    assert found["memory"].found.startswith(f"{1 + 6 * 0.45:.2f} GB for 6 processes")
    on_cpu = colocated(tables, 2, learner={"world_size": 2, "colocated": True}, samplers={"count": 2})
    assert by_subject(memory_findings(on_cpu, pair, machine))["memory"].found.startswith(
        f"{2 * (8 + 4) + 1 + 6 * 0.45:.2f} GB for 6 processes"
    )


def test_colocated_roles_use_their_cores_in_turns(tables: dict) -> None:
    assert cores_finding(colocated(tables, 2), 3).found.startswith(
        "3 here, and 3 CPUs"
    )  # two samplers, a reward worker


@pytest.fixture
def numbers(recipe: Recipe) -> Plan:
    return replace(
        plan_of(recipe),
        learner_bytes=8 * GIGABYTE,
        sampler_bytes=4 * GIGABYTE,
        reward_worker_bytes={"reward_workers": GIGABYTE},
        round_bytes=GIGABYTE,
    )


@pytest.mark.parametrize(("free", "level"), [(30, "ok"), (17, "warning"), (14, "fault")])
def test_memory_that_is_nearly_or_not_enough_is_reported(recipe: Recipe, numbers: Plan, free: int, level: str) -> None:
    # 8 + 4 + 1 GB, and the libraries of three actors and the driver.
    assert 4 * LIBRARY_BYTES == 1.8 * GIGABYTE
    finding = by_subject(memory_findings(recipe, numbers, FreeMemory(free * GIGABYTE, ())))["memory"]
    assert finding.level == level and finding.found.startswith("14.80 GB for 4 processes")
    assert ("micro_batch_size" in finding.advice) == (level != "ok")


@pytest.mark.parametrize(("gpu", "level"), [(20, "ok"), (14, "warning"), (13, "fault")])
def test_roles_that_share_a_gpu_are_summed_on_it(tables: dict, numbers: Plan, gpu: int, level: str) -> None:
    # 8 + 4 GB, and CUDA's own of two processes.
    recipe = with_roles(tables, learner={"num_gpus": 0.6}, samplers={"num_gpus": 0.4})
    findings = by_subject(memory_findings(recipe, numbers, FreeMemory(64 * GIGABYTE, (gpu * GIGABYTE,))))
    assert findings["GPU memory"].level == level and "13.20 GB on the fullest GPU" in findings["GPU memory"].found
    assert findings["memory"].found.startswith("2.80 GB")  # the reward worker's gigabyte and the libraries


def test_roles_with_a_gpu_each_are_not_summed(tables: dict, numbers: Plan) -> None:
    recipe = with_roles(tables, learner={"num_gpus": 1}, samplers={"num_gpus": 1})
    machine = FreeMemory(64 * GIGABYTE, (10 * GIGABYTE, 10 * GIGABYTE))
    assert "8.60 GB on the fullest" in by_subject(memory_findings(recipe, numbers, machine))["GPU memory"].found


def test_trajectories_that_do_not_fit_the_object_store_are_a_warning(recipe: Recipe, numbers: Plan) -> None:
    for free, level in ((4, "ok"), (3, "warning")):  # × 0.3 against 1 GB
        found = by_subject(memory_findings(recipe, numbers, FreeMemory(free * GIGABYTE, ())))
        assert found["object store"].level == level


@pytest.mark.thorough
def test_the_demo_fits_a_machine_of_two_cores_and_four_gigabytes() -> None:
    recipe = Recipe.load(Path(__file__).parents[2] / "deploy" / "recipes" / "demo.toml")
    assert cores_finding(recipe, 2).level == "ok"
    findings = memory_findings(recipe, plan_of(recipe), FreeMemory(4 * GIGABYTE, ()))
    assert {finding.level for finding in findings} == {"ok"}
