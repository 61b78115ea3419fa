"""The summary of an evaluation's images is the mean of what each statistic says of one."""

import numpy as np
import pytest

from ray_ddpo.actors.evaluation.image_summary import image_summary


def test_the_summary_of_a_black_and_a_checkered_picture_by_hand() -> None:
    black = np.zeros((32, 32, 3), np.uint8)
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255
    found = image_summary(np.stack([black, halves]), ["cat", "cat"])
    assert found["dark_share"] == pytest.approx((1 + 0.5) / 2)
    assert found["entropy"] == pytest.approx((0 + 1) / 2)  # one level; two levels equally often
    # The Laplacian is ±255 in the two columns at the edge and 0 elsewhere: variance 255² / 16.
    assert found["sharpness"] == pytest.approx(255**2 / 16 / 2)
    assert found["diversity"] == pytest.approx(0.5**0.5)  # half of the pixels differ by 1


def test_a_summary_of_no_picture_has_no_number() -> None:
    assert np.isnan(list(image_summary(np.zeros((0, 8, 8, 3), np.uint8), []).values())).all()
