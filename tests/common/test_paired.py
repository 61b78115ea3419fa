"""Paired changes, worked out by hand."""

import math

import numpy as np
import pytest

from ray_ddpo.common.metrics.statistics import PairedChange, in_errors, paired_change


def test_a_paired_change_by_hand() -> None:
    change = paired_change(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 6.0]))
    assert change is not None and (change.images, change.before, change.change) == (3, 2.0, pytest.approx(4 / 3))
    assert change.error == pytest.approx((7 / 9) ** 0.5)  # differences 1, 0, 3 with deviation √(7/3), over √3
    assert change.spread == 1.0 and change.errors == pytest.approx(4 / 3 / (7 / 9) ** 0.5)


def test_only_pictures_with_both_scores_count() -> None:
    change = paired_change(np.array([1.0, math.nan, 3.0, 4.0]), np.array([2.0, 2.0, math.inf, 6.0]))
    assert change is not None and (change.images, change.before, change.after) == (2, 2.5, 4.0)
    assert paired_change(np.array([1.0, math.nan]), np.array([1.0, 1.0])) is None


def test_what_is_rounding_is_no_standard_error() -> None:
    assert in_errors(1.0, 1e-7) is None and in_errors(1.0, 1e-3) == pytest.approx(1000)
    assert PairedChange(2, 0.0, 0.0, 0.0, 1.0).errors is None
