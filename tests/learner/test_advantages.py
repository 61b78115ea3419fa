"""Advantages: by hand, and against the tracker of the reference over many rounds."""

import numpy as np
import pytest

from learner.advantages import extend_statistics, per_prompt_advantages, round_advantages
from tests.reference.ddpo_reference import PerPromptTracker


def advantages_of(rounds: list[tuple[list[str], list[float]]], buffer_size: int, min_count: int) -> list[np.ndarray]:
    """Each round's advantages, with the statistics of those before it."""
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


def test_each_prompt_is_held_against_its_own_rewards_by_hand() -> None:
    (advantages,) = advantages_of([(["cat", "dog", "cat", "dog"], [1.0, 10.0, 3.0, 30.0])], 8, 2)
    # cats: mean 2, deviation 1; dogs: mean 20, deviation 10
    assert advantages == pytest.approx([-1, -1, 1, 1], abs=2e-6)
    assert advantages[0] == pytest.approx(-1 / (1 + 1e-6), rel=1e-12)


def test_this_rounds_rewards_are_among_those_they_are_held_against() -> None:
    rounds = [(["cat", "cat"], [0.0, 2.0]), (["cat"], [4.0])]
    # 0, 2, 4: mean 2, deviation √(8/3)
    assert advantages_of(rounds, 8, 3)[1] == pytest.approx([2 / (8 / 3) ** 0.5], rel=1e-5)


def test_a_prompt_below_min_count_is_held_against_the_whole_round_and_its_neighbour_is_not() -> None:
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
