"""Reward aggregation: each kind compared with numbers by hand and a slow reference, floors, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import feasible_first, shortfall, win_rates
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.algorithms.diffusion_nft import DiffusionNFT
from ray_ddpo.learner.algorithms.reward_aggregation import AggregatedAdvantages, RewardAggregation, Statistics

ROUND = DDPOImportanceSampling(advantages=AdvantageSettings(kind="round"))
GROUP = DDPOImportanceSampling(advantages=AdvantageSettings(kind="group"))
numbers = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=8, max_size=8)


def aggregated(
    aggregation: RewardAggregation, rewards: dict[str, list], algorithm: Algorithm = ROUND, group: int = 1
) -> AggregatedAdvantages:
    arrays = {name: np.array(values, np.float32) for name, values in rewards.items()}
    prompts = ["cat"] * len(next(iter(arrays.values())))
    return aggregation.compute_advantages(algorithm, {}, prompts, arrays, group)[1]


def test_a_sum_is_of_the_rewards_as_they_are_and_keeps_no_parts() -> None:
    found = aggregated(RewardAggregation({"a": 2.0, "b": -1.0}), {"a": [1, 2, 3], "b": [0, 4, 0]})
    # 2, 0, 6: mean 8/3, deviation √(56/9)
    assert found.advantages == pytest.approx((np.array([2, 0, 6]) - 8 / 3) / (56 / 9) ** 0.5)
    assert found.parts == {}


def test_normalized_rewards_count_by_their_weights_and_not_by_their_units() -> None:
    aggregation = RewardAggregation({"a": 1.0, "b": 0.5}, "z_score")
    found = aggregated(aggregation, {"a": [0, 1], "b": [0, -1000]})
    assert found.parts["a"] == pytest.approx([-1, 1]) and found.parts["b"] == pytest.approx([1, -1])
    assert found.advantages == pytest.approx([-1, 1])  # −1 + 0.5 and 1 − 0.5, over their deviation
    in_other_units = aggregated(aggregation, {"a": [0, 7], "b": [5, 4]})
    assert in_other_units.advantages == pytest.approx(found.advantages)


def test_win_rates_by_hand() -> None:
    # Of 1, 3, 3: the first beats nobody, the others beat one of two and tie with the other.
    assert win_rates(np.array([1.0, 3.0, 3.0, 9.0, 2.0, 4.0]), 3).tolist() == [0, 0.75, 0.75, 1, 0, 0.5]


@given(numbers, st.sampled_from([2, 4, 8]))
def test_win_rates_are_those_of_a_slow_count_of_pairs(rewards: list[float], group: int) -> None:
    expected = []
    for place, own in enumerate(rewards):
        start = place - place % group
        others = [rewards[other] for other in range(start, start + group) if other != place]
        expected.append(sum(1.0 if own > other else 0.5 if own == other else 0.0 for other in others) / len(others))
    rates = win_rates(np.array(rewards), group)
    assert rates == pytest.approx(expected)
    assert rates.reshape(-1, group).mean(1) == pytest.approx(0.5)
    # Order alone counts, so any growing function of the reward gives the same.
    assert win_rates(np.array(rewards) ** 3, group).tolist() == rates.tolist()


def test_an_outlier_that_rules_a_sum_is_one_win_among_win_rates() -> None:
    weights, rewards = {"a": 1.0, "b": 1.0}, {"a": [1000, 1, 2, 0], "b": [0, 3, 2, 1]}
    summed = aggregated(RewardAggregation(weights), rewards, GROUP, 4).advantages
    by_wins = aggregated(RewardAggregation(weights, "win_rate"), rewards, GROUP, 4)
    assert summed.argmax() == 0
    # Win rates 1, 1/3, 2/3, 0 and 0, 1, 2/3, 1/3: sums 1, 4/3, 4/3, 1/3
    assert by_wins.parts["a"] + by_wins.parts["b"] == pytest.approx([1, 4 / 3, 4 / 3, 1 / 3])
    assert by_wins.advantages[1] == pytest.approx(by_wins.advantages[2]) == pytest.approx(by_wins.advantages.max())


def test_gdpo_distinguishes_images_whose_sums_of_rewards_are_equal() -> None:
    """Rewards (0, 1) and (1, 0) have the same sum. Compared separately, the rarer one has the larger advantage."""
    weights, rewards = {"a": 1.0, "b": 1.0}, {"a": [0, 0, 0, 1], "b": [1, 0, 1, 0]}
    summed = aggregated(RewardAggregation(weights), rewards, GROUP, 4).advantages
    apart = aggregated(RewardAggregation(weights, "advantages"), rewards, GROUP, 4)
    assert summed[0] == summed[2] == summed[3]
    assert apart.advantages[3] > apart.advantages[0] == apart.advantages[2] > apart.advantages[1]
    deviations = {"a": (3 / 16) ** 0.5 + 1e-4, "b": 0.5 + 1e-4}
    by_hand = {
        "a": (np.array([0, 0, 0, 1]) - 0.25) / deviations["a"],
        "b": (np.array([1, 0, 1, 0]) - 0.5) / deviations["b"],
    }
    for name, values in by_hand.items():
        assert apart.parts[name] == pytest.approx(values)
    total = by_hand["a"] + by_hand["b"]
    assert apart.advantages == pytest.approx((total - total.mean()) / (total.std() + 1e-8))


def test_gdpo_keeps_statistics_of_each_reward_over_rounds() -> None:
    aggregation = RewardAggregation({"a": 1.0, "b": 3.0}, "advantages")
    algorithm = DDPOImportanceSampling(advantages=AdvantageSettings(buffer_size=4, min_count=2))
    statistics: Statistics = {}
    for round_index in range(2):
        rewards = {"a": np.array([1.0, 2.0]) + round_index, "b": np.array([5.0, 3.0])}
        statistics, found = aggregation.compute_advantages(algorithm, statistics, ["cat", "cat"], rewards, 1)
    assert statistics == {"a": {"cat": (1.0, 2.0, 2.0, 3.0)}, "b": {"cat": (5.0, 3.0, 5.0, 3.0)}}
    assert found.parts["a"] == pytest.approx(np.array([0.0, 1.0]) / 0.5**0.5, abs=1e-5)


def test_gdpo_sums_the_advantages_that_an_algorithm_of_ones_own_computes() -> None:
    class Ranks(DDPOImportanceSampling):
        def compute_advantages(self, statistics, prompts, rewards, images_per_prompt):
            return statistics, rewards.argsort().argsort().astype(float)

    rewards = {"a": [0.0, 5.0, 9.0], "b": [1.0, 2.0, 3.0]}
    found = aggregated(RewardAggregation({"a": 1.0, "b": 1.0}, "advantages"), rewards, Ranks(), 1)
    assert found.parts["a"].tolist() == found.parts["b"].tolist() == [0, 1, 2]


def test_aggregated_rewards_have_one_ring_a_prompt_however_many_rewards() -> None:
    aggregation = RewardAggregation({"a": 1.0, "b": 1.0})
    algorithm = DDPOImportanceSampling(advantages=AdvantageSettings(min_count=1))
    rewards = {"a": np.array([1.0, 2.0]), "b": np.array([5.0, 3.0])}
    assert aggregation.compute_advantages(algorithm, {}, ["cat", "dog"], rewards, 1)[0] == {
        "joined": {"cat": (6.0,), "dog": (5.0,)}
    }


def test_diffusion_nft_makes_optimalities_of_aggregated_advantages() -> None:
    algorithm = DiffusionNFT(advantage_clip=2.0, advantages=AdvantageSettings(kind="round"))
    aggregation = RewardAggregation({"a": 1.0, "b": 1.0}, "advantages")
    rewards = {"a": np.array([0.0, 1.0]), "b": np.array([0.0, 9.0])}
    found = aggregation.compute_advantages(algorithm, {}, ["cat"] * 2, rewards, 1)[1]
    assert found.advantages == pytest.approx([0.25, 0.75])  # 1/2 ± 1/2 · 1/2


def test_images_below_a_floor_rank_under_all_that_keep_it_by_how_far_they_miss_it() -> None:
    assert shortfall(np.array([1.0, 3.0, 5.0, 7.0]), 4.0) == pytest.approx(np.array([3, 1, 0, 0]) / 5**0.5)
    # Deviation of 9, 8, 1, 3 is √(45.6875 − …): mean 5.25, squares 14.0625, 7.5625, 18.0625, 5.0625 → 11.1875
    expected = [1 - 2 * 11.1875**0.5, 1 - 0.5 * 11.1875**0.5, 1, 3]
    assert feasible_first(np.array([9.0, 8.0, 1.0, 3.0]), np.array([2.0, 0.5, 0.0, 0.0])) == pytest.approx(expected)


def test_where_no_image_keeps_the_floor_the_shortfall_alone_counts() -> None:
    assert feasible_first(np.array([9.0, 8.0]), np.array([2.0, 0.5])).tolist() == [-2, -0.5]


@given(numbers, numbers, st.floats(-100, 100))
def test_a_floor_never_lets_an_image_below_it_beat_one_that_keeps_it(
    aims: list[float], held: list[float], floor: float
) -> None:
    missing = shortfall(np.array(held), floor)
    ranked = feasible_first(np.array(aims), missing)
    keeps = missing == 0
    if keeps.any() and not keeps.all():
        assert ranked[keeps].min() >= ranked[~keeps].max()
    assert ranked[keeps].tolist() == np.array(aims)[keeps].tolist()
    order = np.argsort(missing[~keeps], kind="stable")
    assert (np.diff(ranked[~keeps][order]) <= 0).all()


@pytest.mark.parametrize("kind", ["sum", "z_score", "advantages", "win_rate"])
def test_a_floor_holds_in_every_kind_of_aggregation(kind: str) -> None:
    aggregation = RewardAggregation({"aim": 1.0, "guard": 0.0}, kind, {"guard": 0.5})
    found = aggregated(aggregation, {"aim": [10, 1, 2, 9], "guard": [0.1, 0.9, 0.8, 0.4]}, GROUP, 4)
    assert found.advantages.argsort().tolist() == [0, 3, 1, 2]


def test_a_floor_that_all_images_keep_changes_nothing() -> None:
    rewards = {"aim": [4.0, 1.0, 2.0], "guard": [0.9, 0.9, 0.5]}
    without = RewardAggregation({"aim": 1.0, "guard": 0.0})
    with_floor = RewardAggregation(without.weights, "sum", {"guard": 0.5})
    assert aggregated(with_floor, rewards).advantages.tolist() == aggregated(without, rewards).advantages.tolist()


TWO = {"rewards": [{"name": "jpeg_compressibility"}, {"name": "animal_classifier", "weight": 0.5, "floor": -1.0}]}


def recipe_with(tables: dict, *words: str, **values: object) -> Recipe:
    tables = {key: value for key, value in tables.items() if key != "reward"}
    return Recipe.parse(with_overrides({**tables, **values}, list(words)))


def test_a_recipe_says_weights_floors_and_how_they_are_aggregated(tables: dict) -> None:
    components = components_of(recipe_with(tables, "--aggregation.kind", "z_score", **TWO))
    weights = {"jpeg_compressibility": 1.0, "animal_classifier": 0.5}
    assert components.aggregation == RewardAggregation(weights, "z_score", {"animal_classifier": -1.0})


def test_an_algorithm_without_advantages_cannot_join_them(tables: dict) -> None:
    of_rwr = {**tables, "algorithm": {"name": "rwr"}}
    with pytest.raises(
        ValueError, match="aggregation.kind is 'advantages', and RewardWeightedRegression makes weights"
    ):
        components_of(recipe_with(of_rwr, "--aggregation.kind", "advantages", "--learner.micro_batch_size", "4", **TWO))


@pytest.mark.parametrize(
    "words, values, text",
    [
        (["--aggregation.kind", "product"], TWO, r"aggregation.kind is 'product': input should be 'sum', 'z_score'"),
        (["--aggregation.kind", "win_rate"], TWO, "a group needs at least 2 images of one prompt"),
        (
            [],
            {"rewards": [{"name": "jpeg_compressibility", "weight": 0}]},
            "every weight of .* is 0 and none has a floor",
        ),
    ],
)
def test_what_cannot_be_aggregated_is_refused(tables: dict, words: list[str], values: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        recipe_with(tables, *words, **values)
