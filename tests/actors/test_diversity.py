"""Diversity: worked out by hand on plain images."""

import math

import numpy as np
import pytest

from ray_ddpo.actors.evaluation.image_summary import diversity


def plain(*greys: int) -> np.ndarray:
    return np.stack([np.full((32, 32, 3), grey, np.uint8) for grey in greys])


def test_it_is_the_mean_over_pairs_and_then_over_prompts() -> None:
    # cats: the pairs differ by 51, 102 and 51 of 255; dogs by 255: mean of (.2 + .4 + .2) / 3 and 1
    images = plain(0, 51, 102, 0, 255)
    assert diversity(images, ["cat", "cat", "cat", "dog", "dog"]) == pytest.approx((0.8 / 3 + 1) / 2)


def test_pictures_that_are_all_alike_have_none() -> None:
    assert diversity(plain(7, 7, 7), ["cat"] * 3) == 0


def test_pictures_of_different_prompts_are_not_compared() -> None:
    assert diversity(plain(0, 0, 255, 255), ["cat", "cat", "dog", "dog"]) == 0
    assert math.isnan(diversity(plain(0, 255), ["cat", "dog"]))


def test_texture_finer_than_the_small_picture_does_not_count() -> None:
    board = np.indices((32, 32)).sum(0) % 2 * 255
    checks = np.stack([np.repeat(each[..., None], 3, -1) for each in (board, 255 - board)]).astype(np.uint8)
    assert diversity(checks, ["cat", "cat"]) == 0
