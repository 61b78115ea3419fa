"""Statistics of groups, with numbers worked out by hand."""

import math

import numpy as np
import pytest

from ray_ddpo.common.metrics.group_statistics import RewardRange, group_metrics, saturation, weighted_range

# Two groups of four: equal rewards; 0, 0, 1, 1, whose deviation is 1/2.
REWARDS = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])


def test_groups_without_spread_are_counted_and_the_others_spread_is_averaged() -> None:
    found = group_metrics(REWARDS, 4, None)
    assert found["reward/zero_std_groups"] == 0.5
    assert found["reward/group_std"] == pytest.approx((0 + 0.5) / 2)
    assert found["reward/saturation"] == pytest.approx((4 + 2) / 8)  # at the maximum of their group


def test_saturation_is_the_share_at_the_best_possible_reward_if_there_is_one() -> None:
    assert group_metrics(REWARDS, 4, RewardRange(0.0, 2.0))["reward/saturation"] == 0
    assert group_metrics(REWARDS, 4, RewardRange(0.0, 1.0))["reward/saturation"] == pytest.approx(6 / 8)


def test_without_groups_the_round_is_one() -> None:
    found = group_metrics(np.array([1.0, 2.0, 3.0, 4.0]), 1, None)
    assert found["reward/zero_std_groups"] == 0 and found["reward/saturation"] == 0.25
    assert found["reward/group_std"] == pytest.approx(math.sqrt(1.25))


def test_a_reward_within_a_hundredth_of_the_range_is_the_best() -> None:
    possible = RewardRange(-1.0, 1.0)
    assert possible.is_best(np.array([0.99, 0.981, 0.97, math.nan])).tolist() == [True, True, False, False]
    assert saturation(np.array([1.0, 0.0, math.nan]), possible) == 0.5
    assert math.isnan(saturation(np.array([math.nan]), possible))


def test_the_range_of_a_weighted_sum_takes_the_lowest_score_for_a_negative_weight() -> None:
    ranges = {"judge": (0.0, 1.0), "dark": (0.0, 1.0), "clip": None}
    found = weighted_range(ranges, {"judge": 2.0, "dark": -0.5})
    assert found == RewardRange(-0.5, 2.0)
    assert weighted_range(ranges, {"judge": 2.0, "clip": 0.1}) is None
    assert weighted_range(ranges, {"judge": 1.0, "clip": 0.0}) == RewardRange(0.0, 1.0)
    assert weighted_range(ranges, {"clip": 0.0}) is None
