"""The summary of an evaluation's images is the mean of what each statistic says of one."""

import numpy as np
import pytest

from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.common.recipe.tables import GuardTable
from ray_ddpo.deploy.evaluation.guard import VersionStats, alarms


def test_the_summary_of_a_black_and_a_checkered_image_by_hand() -> None:
    black = np.zeros((32, 32, 3), np.uint8)
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255
    found = image_summary(np.stack([black, halves]), ["cat", "cat"])
    assert found["dark_share"] == pytest.approx((1 + 0.5) / 2)
    assert found["entropy"] == pytest.approx((0 + 1) / 2)  # one level; two levels equally often
    # The Laplacian is ±255 in the two columns at the edge and 0 elsewhere: variance 255² / 16.
    assert found["sharpness"] == pytest.approx(255**2 / 16 / 2)
    # Sobel's slope is 4 · 255 in the same two columns: two of 32.
    assert found["edge_density"] == pytest.approx(2 / 32 / 2)
    assert found["diversity"] == pytest.approx(0.5**0.5)  # half of the pixels differ by 1


def test_a_summary_of_no_image_has_no_number() -> None:
    assert np.isnan(list(image_summary(np.zeros((0, 8, 8, 3), np.uint8), []).values())).all()


def scene_with_a_sign(background: float) -> np.ndarray:
    """Return an image of textured background and a white sign with black bars; `background` is the texture's share."""
    generator = np.random.default_rng(0)
    texture = generator.normal(90, 25, (128, 128, 3)).clip(0, 255)
    kept = np.zeros((128, 128, 1), bool)
    kept[: round(128 * background)] = True
    image = np.where(kept, texture, 12).astype(np.uint8)
    image[40:88, 16:112] = 240
    image[48:80, 24:104:8] = 10
    return image


def test_a_background_that_is_blanked_while_its_lettering_stays_is_an_alarm() -> None:
    """The published case: an OCR reward leaves the lettering and blanks the scene. The sharpness stays high."""
    before, after = (image_summary(np.stack([scene_with_a_sign(share)] * 2), ["a", "a"]) for share in (1.0, 0.1))
    assert 0.2 < after["edge_density"] / before["edge_density"] < 0.5
    assert after["entropy"] / before["entropy"] < 0.6
    assert after["sharpness"] / before["sharpness"] > 0.5, "the lettering has most of the contrast"
    base, now = VersionStats({}, before), VersionStats({}, after)
    assert {alarm.about for alarm in alarms(base, now, [], GuardTable())} >= {"edge_density", "entropy"}
    assert list(alarms(base, base, [], GuardTable())) == []
