"""A learner rank and a sampler on one GPU: which recipes are refused, and what a pair asks for, by hand."""

import pytest

from ray_ddpo.common.recipe.colocation import pair_resources
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import refused
from ray_ddpo.learner.process_group import process_groups
from tests.failure_page import assert_documented

SHARES = {"learner": {"num_gpus": 0.5}, "samplers": {"num_gpus": 0.5}}


def colocated(tables: dict, pairs: int = 2, **changes: dict | int) -> Recipe:
    learner = {"colocated": True, "world_size": pairs, **changes.pop("learner", {})}  # type: ignore[dict-item]
    samplers = {"count": pairs, **changes.pop("samplers", {})}  # type: ignore[dict-item]
    return Recipe.parse({**tables, "learner": {**tables["learner"], **learner}, "samplers": samplers, **changes})


@pytest.mark.parametrize(
    ("changes", "situation"),
    [
        ({"max_policy_lag": 1}, "`learner.colocated` with a lag above 0"),
        ({"learner": {"parts_per_round": 2}}, "`learner.colocated` with rounds in parts"),
        ({"samplers": {"count": 3}}, "`learner.colocated` with another number of samplers than ranks"),
        ({"samplers": {"max": 4}}, "`learner.colocated` with `samplers.max` above the samplers' number"),
        ({"learner": {"num_gpus": 1}, "samplers": {"num_gpus": 1}}, "`learner.colocated` without shares of one GPU"),
        ({"learner": {"num_gpus": 0.5}}, "`learner.colocated` without shares of one GPU"),
        (
            {"learner": {"num_gpus": 0.3}, "samplers": {"num_gpus": 0.2}},
            "`learner.colocated` without shares of one GPU",
        ),
    ],
)
def test_a_recipe_whose_roles_cannot_take_turns_is_refused(tables: dict, changes: dict, situation: str) -> None:
    with pytest.raises(ValueError) as error:
        colocated(tables, **changes)
    assert_documented(situation, 2, f"ddpo train: {error.value}")
    apart = {**changes, "learner": {**changes.get("learner", {}), "colocated": False}}
    assert not colocated(tables, **apart).learner.colocated, "it is the colocation that is refused"


def test_one_gpu_has_one_type(tables: dict) -> None:
    kinds = {"learner": {"num_gpus": 0.5, "accelerator_type": "H100"}, "samplers": {"num_gpus": 0.5}}
    assert pair_resources(colocated(tables, **kinds).learner, colocated(tables, **kinds).samplers) == {
        "CPU": 2,
        "GPU": 1,
        "accelerator_type:H100": 0.001,
    }
    kinds["samplers"]["accelerator_type"] = "A100"
    with pytest.raises(
        ValueError, match="accelerator_type 'H100' and samplers.accelerator_type 'A100'.* name one type"
    ):
        colocated(tables, **kinds)


def test_a_pair_asks_for_what_both_ask_for(tables: dict) -> None:
    roles = {
        "learner": {"num_gpus": 0.55, "num_cpus": 2, "resources": {"gpu_node": 0.1}},
        "samplers": {"num_gpus": 0.35, "num_cpus": 0, "resources": {"gpu_node": 0.2}},
    }
    recipe = colocated(tables, **roles)
    assert pair_resources(recipe.learner, recipe.samplers) == {"CPU": 2, "GPU": 0.9, "gpu_node": 0.3}
    with pytest.raises(ValueError, match="num_cpus and num_gpus of learner and samplers are 0"):
        colocated(tables, learner={"num_cpus": 0}, samplers={"num_cpus": 0})


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_one_and_more_pairs_are_accepted_with_and_without_gpus(tables: dict, pairs: int) -> None:
    assert colocated(tables, pairs).samplers.count == pairs
    assert colocated(tables, pairs, **SHARES).learner.num_gpus == 0.5


def test_ranks_beside_samplers_have_a_gpu_of_their_own_for_nccl(tables: dict) -> None:
    on_one = {"learner": {**tables["learner"], "world_size": 2, "num_gpus": 0.5}}
    assert not any(ranks._own_gpu for ranks in process_groups(Recipe.parse({**tables, **on_one})))
    assert all(ranks._own_gpu for ranks in process_groups(colocated(tables, **SHARES)))


def test_the_number_of_colocated_samplers_stays(tables: dict) -> None:
    recipe = colocated(tables, samplers={"max": 2})
    assert refused(recipe, "samplers", 2) is None and refused(recipe, "reward_workers", 5) is None
    said = f"ddpo scale: {refused(recipe, 'samplers', 4)}"
    assert_documented("`ddpo scale` asks for other samplers of a colocated run", 2, said)
    apart = Recipe.parse({**tables, "samplers": {"count": 2, "max": 8}})
    assert refused(apart, "samplers", 4) is None
    assert "must lie between" in (refused(apart, "samplers", 9) or "")
