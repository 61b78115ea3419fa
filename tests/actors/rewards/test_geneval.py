"""The geneval reward: what the detector of shapes sees in rendered images, judged by the rules."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.rendered_truth import shapes_image
from ray_ddpo.actors.detection.detector import DetectedObject, Detector, Image
from ray_ddpo.actors.rewards.geneval import GenEval
from ray_ddpo.common.prompts import Prompt

CIRCLES = [("circle", "red", 0.25, 0.3, 0.22), ("circle", "red", 0.7, 0.3, 0.22)]
SQUARE = [("square", "blue", 0.5, 0.75, 0.22)]


def line(*include: dict[str, Any], tag: str = "counting", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **more}


@pytest.mark.parametrize(
    ("include", "soft", "strict", "correct"),
    [
        ([{"class": "circle", "count": 2}], 1, 1, 1),
        ([{"class": "circle", "count": 2, "color": "red"}], 1, 1, 1),
        ([{"class": "circle", "count": 2, "color": "green"}], 0.5, 0, 0),
        ([{"class": "circle", "count": 1}], 0, 0, 1),
        ([{"class": "circle", "count": 4}], 0.5, 0, 0),
        ([{"class": "triangle", "count": 1}], 0, 0, 0),
        ([{"class": "circle", "count": 2}, {"class": "square", "count": 1, "position": ["below", 0]}], 1, 1, 1),
        ([{"class": "circle", "count": 2}, {"class": "square", "count": 1, "position": ["above", 0]}], 0.75, 0, 0),
    ],
)
def test_a_rendered_image_is_judged(include: list[dict], soft: float, strict: int, correct: int) -> None:
    images = np.stack([shapes_image(CIRCLES + SQUARE, 64)])
    for measure, score in (("soft", soft), ("strict", strict), ("correct", correct)):
        reward = GenEval(detector="shapes", measure=measure)
        assert reward.load("cpu")(images, ["made up"], [line(*include)]).tolist() == [score], measure


def test_excluded_objects_are_wrong_for_the_authors() -> None:
    images = np.stack([shapes_image(CIRCLES, 64)])
    metadata = line({"class": "circle", "count": 1}, exclude=[{"class": "circle", "count": 2}])
    assert GenEval(detector="shapes", measure="correct").load("cpu")(images, ["one circle"], [metadata]).tolist() == [0]


class TwoCats(Detector):
    """Sees two cats everywhere, of confidence 0.95 and 0.5."""

    def __init__(self, device: str) -> None:
        pass

    def detect(self, images: Sequence[Image], classes: Sequence[Collection[str]]) -> list[dict]:
        cats = [DetectedObject((0.0, 0.0, 9.0, 9.0), 0.5), DetectedObject((1.0, 0.0, 9.0, 9.0), 0.95)]
        return [{"cat": cats} for _ in images]

    def colours(self, image: Image, objects: Sequence[DetectedObject], name: str) -> list[str]:
        return ["red" if found.score > 0.9 else "blue" for found in objects]


@pytest.mark.parametrize(
    ("keys", "tag", "score"),
    [
        ({}, "two_object", 1),
        ({}, "counting", 0.5),  # one is below counting_threshold
        ({"counting_threshold": 0.4}, "counting", 1),
        ({"threshold": 0.6}, "two_object", 0.5),
        ({"max_objects": 1}, "two_object", 0.5),
        ({"max_overlap": 0.5}, "two_object", 0.5),
    ],
)
def test_a_detector_of_the_users_own_is_filtered_by_the_keys(keys: dict, tag: str, score: float) -> None:
    reward = GenEval(detector="tests.actors.rewards.test_geneval:TwoCats", **keys)
    assert reward.user_modules() == {"detector": "tests.actors.rewards.test_geneval"}
    images = np.zeros((1, 8, 8, 3), np.uint8)
    metadata = line({"class": "cat", "count": 2}, tag=tag)
    assert reward.load("cpu")(images, ["two cats"], [metadata]).tolist() == [score]


def test_another_class_is_no_detector() -> None:
    with pytest.raises(ValueError, match="reward.detector is 'pathlib:Path': it must be derived from Detector"):
        GenEval(detector="pathlib:Path").load("cpu")


def test_prompts_are_checked_before_anything_is_sampled() -> None:
    reward = GenEval(detector="shapes")
    circle = Prompt("a circle", line({"class": "circle", "count": 1}))
    reward.check_prompts([circle])
    with pytest.raises(ValueError, match="prompt 'a cat' has metadata that the reward geneval cannot use: tag"):
        reward.check_prompts([circle, Prompt("a cat")])
    with pytest.raises(ValueError, match=r"does not know \['cat'\]"):
        reward.check_prompts([Prompt("a cat", line({"class": "cat", "count": 1}))])
    with pytest.raises(ValueError, match="prompt 'many' counts to 17, and reward.max_objects is 16"):
        reward.check_prompts([Prompt("many", line({"class": "circle", "count": 17}))])
