"""Advantages: by hand, and against the tracker of the reference over many rounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.learner.algorithms.advantages import (
    extend_statistics,
    group_advantages,
    optimality,
    per_prompt_advantages,
    round_advantages,
    softmax_weights,
    sparse_weights,
)
from tests.reference import algorithms_reference as others
from tests.reference.ddpo_reference import PerPromptTracker


def advantages_of(rounds: list[tuple[list[str], list[float]]], buffer_size: int, min_count: int) -> list[np.ndarray]:
    """Return each round's advantages, with the statistics of earlier rounds."""
    statistics, results = {}, []
    for prompts, rewards in rounds:
        statistics = extend_statistics(statistics, prompts, np.array(rewards), buffer_size)
        results.append(per_prompt_advantages(statistics, prompts, np.array(rewards), min_count))
    return results


def test_over_a_round_by_hand_with_the_population_deviation() -> None:
    # mean 3, deviation √((4 + 0 + 4) / 3)
    expected = [-2 / (8 / 3) ** 0.5, 0, 2 / (8 / 3) ** 0.5]
    assert round_advantages(np.array([1.0, 3.0, 5.0])) == pytest.approx(expected)


def test_equal_rewards_have_no_advantage_and_no_division_by_zero() -> None:
    assert round_advantages(np.array([2.0, 2.0, 2.0])).tolist() == [0, 0, 0]
    assert advantages_of([(["cat", "cat"], [2.0, 2.0])], 8, 1)[0].tolist() == [0, 0]


def test_each_prompt_is_compared_with_its_own_rewards_by_hand() -> None:
    (advantages,) = advantages_of([(["cat", "dog", "cat", "dog"], [1.0, 10.0, 3.0, 30.0])], 8, 2)
    # cats: mean 2, deviation 1; dogs: mean 20, deviation 10
    assert advantages == pytest.approx([-1, -1, 1, 1], abs=2e-6)
    assert advantages[0] == pytest.approx(-1 / (1 + 1e-6), rel=1e-12)


def test_this_rounds_rewards_are_among_those_they_are_compared_with() -> None:
    rounds = [(["cat", "cat"], [0.0, 2.0]), (["cat"], [4.0])]
    # 0, 2, 4: mean 2, deviation √(8/3)
    assert advantages_of(rounds, 8, 3)[1] == pytest.approx([2 / (8 / 3) ** 0.5], rel=1e-5)


def test_only_a_prompt_below_min_count_is_compared_with_the_round() -> None:
    (advantages,) = advantages_of([(["cat", "dog", "cat"], [1.0, 8.0, 3.0])], 8, 2)
    # the dog is alone: round mean 4, deviation √((9 + 16 + 1) / 3); cats: mean 2, deviation 1
    assert advantages == pytest.approx([-1, 4 / (26 / 3) ** 0.5, 1], rel=1e-5)


def test_the_ring_forgets_the_oldest_rewards() -> None:
    statistics = extend_statistics({"cat": (9.0, 1.0)}, ["cat", "cat"], np.array([2.0, 3.0]), 3)
    assert statistics == {"cat": (1.0, 2.0, 3.0)}


def test_the_statistics_given_are_not_changed() -> None:
    before = {"cat": (1.0,)}
    extend_statistics(before, ["cat", "dog"], np.array([2.0, 3.0]), 3)
    assert before == {"cat": (1.0,)}


@pytest.mark.parametrize(("buffer_size", "min_count"), [(32, 16), (5, 5), (4, 2), (1, 1)])
def test_ten_rounds_give_the_references_advantages(buffer_size: int, min_count: int) -> None:
    generator = np.random.default_rng(buffer_size)
    rounds = [
        (generator.choice(["cat", "dog", "cow", "hen"], 12).tolist(), generator.normal(-5, 3, 12).tolist())
        for _ in range(10)
    ]
    tracker = PerPromptTracker(buffer_size, min_count)
    for ours, (prompts, rewards) in zip(advantages_of(rounds, buffer_size, min_count), rounds, strict=True):
        assert ours == pytest.approx(tracker.update(prompts, rewards), rel=1e-6, abs=1e-6)


def test_adding_a_constant_to_all_rewards_changes_nothing() -> None:
    prompts, rewards = ["cat", "dog"] * 8, np.random.default_rng(0).normal(size=16)
    rounds = [(prompts, rewards.tolist()), (prompts, (rewards[::-1] * 2).tolist())]
    raised = [(texts, [value + 100 for value in values]) for texts, values in rounds]
    for before, after in zip(advantages_of(rounds, 12, 4), advantages_of(raised, 12, 4), strict=True):
        assert after == pytest.approx(before, rel=1e-9, abs=1e-9)
    assert round_advantages(rewards + 100) == pytest.approx(round_advantages(rewards), abs=1e-9)


def test_rewards_that_differ_little_around_a_large_mean_keep_their_digits() -> None:
    # In float32 the deviation of 1e6 ± 0.1 would be lost.
    rewards = np.array([1e6 - 0.125, 1e6 + 0.125], np.float32)
    assert round_advantages(rewards) == pytest.approx([-1, 1], abs=1e-6)


def test_within_groups_by_hand() -> None:
    # groups 1, 3 (mean 2, deviation 1) and 10, 30 (mean 20, deviation 10)
    advantages = group_advantages(np.array([1.0, 3.0, 10.0, 30.0]), 2, "group")
    assert advantages == pytest.approx([-1 / 1.0001, 1 / 1.0001, -10 / 10.0001, 10 / 10.0001], rel=1e-12)
    by_round = group_advantages(np.array([1.0, 3.0, 10.0, 30.0]), 2, "round")
    assert by_round * np.array([1.0, 3.0, 10.0, 30.0]).std() == pytest.approx([-1, 1, -10, 10], rel=1e-4)


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    assert group_advantages(np.array([2.0, 2.0, 1.0, 3.0]), 2, "group")[:2].tolist() == [0, 0]


REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS, constant=st.floats(-1000, 1000), scale=st.floats(0.5, 20))
def test_group_advantages_are_the_references_and_ignore_constant_and_scale(
    rewards: list[float], constant: float, scale: float
) -> None:
    values = np.array(rewards)
    for deviation in ("group", "round"):
        ours = group_advantages(values, 4, deviation)
        assert ours == pytest.approx(others.group_advantages(rewards, 4, deviation == "round"), rel=1e-9, abs=1e-9)
        assert group_advantages(values + constant, 4, deviation) == pytest.approx(ours, rel=1e-5, abs=1e-5)
        spread = values.reshape(3, 4).std(axis=1).min() if deviation == "group" else values.std()
        if spread > 1:  # there the 1e-4 beside it is small
            assert group_advantages(values * scale, 4, deviation) == pytest.approx(ours, rel=3e-4, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS, order=st.permutations(range(12)))
def test_permuting_a_groups_images_permutes_their_advantages(rewards: list[float], order: list[int]) -> None:
    values = np.array(rewards)
    assert group_advantages(values[order], 12, "group") == pytest.approx(
        group_advantages(values, 12, "group")[order], rel=1e-6, abs=1e-6
    )
    assert round_advantages(values[order]) == pytest.approx(round_advantages(values)[order], rel=1e-6, abs=1e-6)


def test_softmax_weights_by_hand_over_the_round_and_over_each_prompt() -> None:
    rewards = np.array([0.0, np.log(3.0), 5.0])
    # 1 : 3 with mean 1 among the cats; the dog is alone
    assert softmax_weights(rewards, ["cat", "cat", "dog"], 1.0) == pytest.approx([0.5, 1.5, 1.0])
    assert softmax_weights(rewards[:2], ["", ""], 2.0) == pytest.approx([2 / 10, 2 * 9 / 10])


@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS, inverse_temperature=st.floats(0.01, 1), constant=st.floats(-1e4, 1e4))
def test_softmax_weights_are_the_references_have_mean_one_and_know_no_constant(
    rewards: list[float], inverse_temperature: float, constant: float
) -> None:
    ours = softmax_weights(np.array(rewards), [""] * 12, inverse_temperature)
    assert ours == pytest.approx(others.softmax_weights(rewards, inverse_temperature), rel=1e-9, abs=1e-12)
    assert ours.mean() == pytest.approx(1)
    raised = softmax_weights(np.array(rewards) + constant, [""] * 12, inverse_temperature)
    assert raised == pytest.approx(ours, rel=1e-6, abs=1e-9)


def test_large_rewards_do_not_overflow_the_exponential() -> None:
    assert softmax_weights(np.array([1e5, 1e5 - 1]), ["", ""], 1.0) == pytest.approx([1.4621171, 0.5378829])


def test_sparse_weights_by_hand() -> None:
    statistics = extend_statistics({"cat": (0.0, 1.0, 2.0)}, ["cat", "dog", "cat"], np.array([3.0, 9.0, 2.5]), 8)
    # cats so far 0 1 2 3 2.5: median 2; the dog is alone and held against the round 3 9 2.5: median 3
    weights = sparse_weights(statistics, ["cat", "dog", "cat"], np.array([3.0, 9.0, 2.5]), 50.0, 2)
    assert weights.tolist() == [1, 1, 1]
    assert sparse_weights(statistics, ["cat", "dog", "cat"], np.array([3.0, 9.0, 2.5]), 80.0, 2).tolist() == [1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(rewards=REWARDS, percent=st.floats(0, 99))
def test_what_counts_is_at_or_above_the_references_percentile_and_never_nothing(
    rewards: list[float], percent: float
) -> None:
    statistics = extend_statistics({}, ["cat"] * 12, np.array(rewards), 64)
    weights = sparse_weights(statistics, ["cat"] * 12, np.array(rewards), percent, 1)
    bar = others.percentile(rewards, percent)
    assert all(
        weight == (reward >= bar) or abs(reward - bar) < 1e-9 for weight, reward in zip(weights, rewards, strict=True)
    )
    assert weights[int(np.argmax(rewards))] == 1


def test_how_much_an_image_belongs_to_the_good_ones_by_hand() -> None:
    assert optimality(np.array([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]
