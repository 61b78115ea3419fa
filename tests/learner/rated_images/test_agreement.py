"""MSE, PLCC and SRCC, by hand."""

import numpy as np
import pytest

from ray_ddpo.learner.aesthetic_head.agreement import agreement, average_ranks, pearson, spearman


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(np.array([30.0, 10.0, 20.0, 10.0, 20.0, 20.0])).tolist() == [6, 1.5, 4, 1.5, 4, 4]


def test_the_correlation_of_values_by_hand() -> None:
    # Distances from the means: (-1, 0, 1) and (-4/3, -1/3, 5/3); 3 / √(2 · 42/9).
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])) == pytest.approx(3 / (2 * 42 / 9) ** 0.5)


def test_the_correlation_of_ranks_by_hand_with_and_without_ties() -> None:
    # Ranks (1 2 3 4) and (2 1 4 3): 1 - 6 · 4 / (4 · 15).
    assert spearman(np.array([1.0, 5.0, 7.0, 100.0]), np.array([3.0, 2.0, 9.0, 8.0])) == pytest.approx(0.6)
    # Ranks (1 2.5 2.5 4) and (1 2 3 4): 4.5 / √(4.5 · 5).
    assert spearman(np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.9**0.5)


def test_a_monotone_map_changes_the_correlation_of_values_alone() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert (pearson(values, np.exp(values)) or 0) < 0.95


def test_the_figures_of_a_split_by_hand() -> None:
    figures = agreement(np.array([2.0, 2.0, 5.0], np.float32), np.array([1.0, 2.0, 3.0]))
    assert figures["images"] == 3
    assert figures["mse"] == pytest.approx(5 / 3) and figures["mse_of_mean"] == pytest.approx(2 / 3)
    assert figures["srcc"] == pytest.approx(1.5 / (1.5 * 2) ** 0.5)  # ranks (1.5 1.5 3) and (1 2 3)


def test_what_does_not_vary_has_no_correlation_and_nothing_has_no_figures() -> None:
    figures = agreement(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    assert figures["srcc"] is None and figures["plcc"] is None and figures["mse"] == 1
    assert agreement(np.empty(0), np.empty(0))["mse"] is None
