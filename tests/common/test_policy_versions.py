"""The rule of policy versions: what a round is sampled with, when it may start, and which versions are kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ddpo.common.policy_versions import (
    evaluation_round,
    kept_versions,
    lag_of,
    last_startable_round,
    num_kept,
    policy_version,
    version_after,
)

rounds, lags = st.integers(0, 10_000), st.integers(0, 3)


def test_versions_by_hand() -> None:
    assert [policy_version(round_index, max_policy_lag=0) for round_index in range(4)] == [0, 1, 2, 3]
    assert [policy_version(round_index, max_policy_lag=1) for round_index in range(4)] == [0, 0, 1, 2]


@given(version=rounds, round_index=rounds, lag=lags)
def test_a_round_may_start_exactly_when_its_version_is_published(version: int, round_index: int, lag: int) -> None:
    assert (round_index <= last_startable_round(version, lag)) == (policy_version(round_index, lag) <= version)


@given(version=rounds, lag=lags)
def test_at_most_one_round_more_than_the_lag_is_in_flight(version: int, lag: int) -> None:
    # Version v has learned from rounds 0 … v - 1.
    assert last_startable_round(version, lag) - version + 1 == num_kept(lag)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_round_finds_its_version_among_the_kept_ones_and_is_never_further_behind(lag: int) -> None:
    kept: tuple[int, ...] = (0,)
    for round_index in range(8):
        version = policy_version(round_index, lag)
        assert version in kept and 0 <= lag_of(round_index, version) <= lag
        kept = kept_versions((*kept, version_after(round_index)), lag)
    assert kept == tuple(range(8 - lag, 9))


@given(version=rounds, lag=lags)
def test_an_evaluation_comes_behind_the_rounds_that_its_version_starts(version: int, lag: int) -> None:
    assert evaluation_round(version, lag, rounds_done=version) == last_startable_round(version, lag)
    assert evaluation_round(version, lag, rounds_done=version + 9) == version + 9
