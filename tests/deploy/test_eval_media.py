"""What trackers are shown of an evaluation: pairs of the same noise with captions, a table, and the scores themselves."""

import math

import numpy as np

from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.trackers.media import CaptionedImage
from ray_ddpo.deploy.evaluation.eval_result import EvalResult
from ray_ddpo.deploy.evaluation.eval_runner import eval_media

PIXELS = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
IMAGES = EvalResult(
    (Prompt("cat"), Prompt("dog"), Prompt("cat")),
    (7, 8, 9),
    {"reward": np.array([1.0, 2.0, 4.0]), "beauty": np.array([0.5, math.nan, 0.25])},
    PIXELS,
)


def test_as_many_pairs_as_there_are_pictures_of_before() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    shown = eval_media(4, IMAGES, [black, black], np.array([0.5, 2.5, 0.0]))
    first, second = shown.images["evaluation"]
    assert (first.caption, second.caption) == ("cat: reward 1 (+0.5)", "dog: reward 2 (-0.5)")
    assert np.array_equal(first.pixels, np.concatenate([black, PIXELS[0]], axis=1))
    table = shown.tables["evaluation"]
    assert table.columns == ("prompt", "seed", "before", "now", "reward", "beauty") and len(table.rows) == 2
    prompt, seed, before, now, *scores = table.rows[0]
    assert (prompt, seed, scores) == ("cat", "7", [1.0, 0.5])
    assert (
        isinstance(before, CaptionedImage) and isinstance(now, CaptionedImage) and np.array_equal(now.pixels, PIXELS[0])
    )
    assert shown.histograms["evaluation/beauty"].tolist() == [0.5, 0.25] and shown.round == 4


def test_without_pictures_there_are_only_the_scores() -> None:
    shown = eval_media(4, IMAGES, [], np.zeros(3))
    assert not shown.images and not shown.tables and shown.histograms["evaluation/reward"].tolist() == [1, 2, 4]
