"""Which workers score what: the shared pool, workers of a reward's own, and what `ddpo scale` may ask for."""

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import RewardPool, all_pools, elastic_roles, reward_pools
from ray_ddpo.deploy.driver.components import components_of


def with_rewards(tables: dict, *rewards: dict, **workers: object) -> Recipe:
    one_reward = {key: value for key, value in tables.items() if key != "reward"}
    return Recipe.parse({**one_reward, "rewards": list(rewards), "reward_workers": workers})


def test_rewards_share_workers_unless_they_have_their_own(tables: dict) -> None:
    rewards = [{"name": "jpeg_compressibility"}, {"name": "aesthetic", "workers": {"count": 3}}]
    recipe = with_rewards(tables, *rewards, {"name": "animal_classifier"}, count=2)
    shared, own = reward_pools(recipe)
    assert shared == RewardPool("reward_workers", ("jpeg_compressibility", "animal_classifier"), recipe.reward_workers)
    assert own.name == "reward_workers.aesthetic" and own.rewards == ("aesthetic",) and own.table.count == 3
    counts = {name: table.count for name, table in elastic_roles(recipe).items()}
    assert counts == {"samplers": 1, "reward_workers": 2, "reward_workers.aesthetic": 3}


def test_there_is_no_shared_pool_if_every_reward_has_its_own(tables: dict) -> None:
    recipe = with_rewards(tables, {"name": "aesthetic", "workers": {}})
    assert [pool.name for pool in reward_pools(recipe)] == ["reward_workers.aesthetic"]


def test_a_cache_for_a_reward_whose_score_depends_on_its_batch_is_refused(tables: dict) -> None:
    components_of(with_rewards(tables, {"name": "jpeg_compressibility"}, cache=10))
    with pytest.raises(
        ValueError, match=r"reward_workers.cache is 10, and the scores of \['animal_classifier'\] depend"
    ):
        components_of(with_rewards(tables, {"name": "animal_classifier"}, cache=10))


def test_an_unknown_key_of_a_rewards_own_workers_is_named(tables: dict) -> None:
    with pytest.raises(ValueError, match=r"rewards.0.workers.nmu_gpus is not a key that is known: .*'num_gpus'"):
        with_rewards(tables, {"name": "aesthetic", "workers": {"nmu_gpus": 1}})


def test_scorers_have_their_own_pool_if_they_are_evaluated_during_training(tables: dict) -> None:
    scorers = {"scorers": [{"name": "brightness"}], "workers": {"count": 2}}
    in_the_report_only = Recipe.parse({**tables, "evaluation": scorers})
    assert [pool.name for pool in all_pools(in_the_report_only)] == ["reward_workers"]
    beside = Recipe.parse({**tables, "evaluation": {**scorers, "every": 5}})
    shared, own = all_pools(beside)
    assert (own.name, own.rewards, own.trains, own.table.count) == ("evaluation.workers", ("brightness",), False, 2)
    assert shared.trains and reward_pools(beside) == (shared,)
    assert elastic_roles(beside)["evaluation.workers"].count == 2
    assert list(components_of(beside).rewards_of(own)) == ["brightness"]
