"""GenEval's rules, by hand and against the authors' definitions written again."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from ray_ddpo.actors.detection.detector import DetectedObject
from ray_ddpo.actors.detection.requirements import Requirements, requirements
from ray_ddpo.actors.detection.rules import iou, is_correct, kept_objects, relative_position, soft_score

RELATIONS = ("left of", "right of", "above", "below")


def at(x: float, y: float, size: float = 10, score: float = 1.0) -> DetectedObject:
    return DetectedObject((float(x), float(y), float(x + size), float(y + size)), score)


def wanted(*include: dict, exclude: Sequence[dict] = (), tag: str = "two_object") -> Requirements:
    return requirements("made up", {"tag": tag, "include": list(include), "exclude": list(exclude)})


def colours(*names: str):
    return lambda objects, name: list(names)[: len(objects)]


def test_iou_counts_the_last_pixel() -> None:
    box = at(0, 0, 9).box  # ten pixels wide
    assert iou(box, box) == 1
    assert iou(box, at(5, 0, 9).box) == pytest.approx(50 / 150)
    assert iou(box, at(20, 20, 9).box) == 0


def test_objects_count_above_the_threshold_by_falling_confidence() -> None:
    objects = [at(0, 0, score=0.3), at(0, 0, score=0.5), at(30, 0, score=0.9), at(60, 0, score=0.95)]
    assert [found.score for found in kept_objects(objects, 0.3, 16, 1.0)] == [0.95, 0.9, 0.5]
    assert [found.score for found in kept_objects(objects, 0.3, 2, 1.0)] == [0.95, 0.9]
    assert [found.score for found in kept_objects(objects, 0.9, 16, 1.0)] == [0.95]


def test_of_overlapping_objects_the_more_confident_is_kept() -> None:
    objects = [at(0, 0, score=0.6), at(1, 0, score=0.9), at(50, 0, score=0.5)]
    assert [found.score for found in kept_objects(objects, 0.3, 16, 0.5)] == [0.9, 0.5]
    assert len(kept_objects(objects, 0.3, 16, 1.0)) == 3


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-30, 0), {"left of"}),
        ((30, 0), {"right of"}),
        ((0, -30), {"above"}),
        ((0, 30), {"below"}),
        ((30, 30), {"right of", "below"}),  # (30 - 2) / 42.4 = 0.66 in both
        ((30, 12), {"right of"}),  # (12 - 2) / 32.3 = 0.31
        ((2, 0), set()),  # 0.1 of both widths together
        ((3.5, 0), set()),  # (3.5 - 2) / 3.5 = 0.43
        ((4.5, 0), {"right of"}),  # (4.5 - 2) / 4.5 = 0.56
        ((0, 0), set()),
    ],
)
def test_a_position_is_an_offset_beyond_both_sizes(offset: tuple[float, float], expected: set[str]) -> None:
    first = at(100 + offset[0], 100 + offset[1])
    assert relative_position(first.box, at(100, 100).box) == expected


def test_too_few_objects_are_wrong_and_more_are_right_unless_excluded() -> None:
    one = wanted({"class": "cat", "count": 1})
    three = wanted({"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}], tag="counting")
    cats = {n: {"cat": [at(20 * i, 0) for i in range(n)]} for n in range(6)}
    assert [is_correct(one, cats[n], colours(), 0.1) for n in range(4)] == [False, True, True, True]
    assert [is_correct(three, cats[n], colours(), 0.1) for n in range(6)] == [False, False, False, True, False, False]
    assert [soft_score(three, cats[n], colours(), 0.1)[0] for n in range(6)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]
    )
    assert [soft_score(three, cats[n], colours(), 0.1)[1] for n in range(6)] == [n == 3 for n in range(6)]
    assert soft_score(one, cats[4], colours(), 0.1)[0] == -2  # 1 - 3 / 1: the authors do not cut at 0


def test_colour_is_that_of_the_most_confident_objects() -> None:
    red = wanted({"class": "cat", "count": 1, "color": "red"})
    two = {"cat": [at(0, 0, score=0.9), at(30, 0, score=0.8)]}
    assert is_correct(red, two, colours("red", "blue"), 0.1)
    assert not is_correct(red, two, colours("blue", "red"), 0.1)
    assert soft_score(red, two, colours("red", "red"), 0.1) == (0.0, False)  # counts: 1 - 1 / 1; colour: 0
    assert soft_score(red, {"cat": two["cat"][:1]}, colours("blue"), 0.1) == (0.5, False)  # 1, and 1 - 1 / 1


def test_a_position_is_relative_to_an_earlier_entry() -> None:
    line = wanted({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]})
    right = {"cat": [at(60, 0)], "dog": [at(0, 0)]}
    swapped = {"cat": [at(0, 0)], "dog": [at(60, 0)]}
    assert is_correct(line, right, colours(), 0.1) and not is_correct(line, swapped, colours(), 0.1)
    assert soft_score(line, right, colours(), 0.1) == (1.0, True)  # 1, 1, 1
    assert soft_score(line, swapped, colours(), 0.1) == (0.75, False)  # 1, 1, 0, 1
    assert soft_score(line, {"dog": [at(0, 0)]}, colours(), 0.1) == (pytest.approx(1 / 3), False)  # 0, 1, 0


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "tag"),
        ({"tag": "counting", "include": []}, "include"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "include.0.color"),
        ({"tag": "position", "include": [{"class": "cat", "count": 0}]}, "include.0.count"),
        ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "earlier entry"),
        ({"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["near", 0]}]}, "include.0.position"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "colour": "red"}]}, "colour: this is not a key"),
        ({"tag": "counting", "include": [{"class": "cat", "count": "two"}]}, "include.0.count is 'two'"),
        ({"tag": "counting", "include": [{"class": "cat", "count": True}]}, "include.0.count is True"),
        ({"tag": "counting", "include": [{"class": "cat", "count": 1}], "excluded": []}, "'exclude' is"),
        ({"tag": "x", "include": [{"class": "cat", "count": 1}, {"class": "cat", "count": 2}]}, "class 'cat' twice"),
        (
            {"tag": "x", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 2}]},
            "exclude forbids 2 or more of 'cat', and include asks for 2",
        ),
    ],
)
def test_metadata_that_are_not_genevals_are_refused_with_the_prompt_and_the_key(metadata: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 'a photo' has metadata .*{said}"):
        requirements("a photo", metadata)


def test_a_table_may_have_no_value_in_a_column_and_other_columns() -> None:
    found = requirements("a cat", {"tag": "x", "include": [{"class": "cat", "count": 1}], "exclude": None, "place": 3})
    assert found.exclude == ()


def test_verdicts_agree_with_the_authors_definitions_on_random_images() -> None:
    generator = np.random.default_rng(0)
    seen = {"correct": set(), "strict": set()}
    for _ in range(400):
        include = [{"class": name, "count": int(generator.integers(1, 3))} for name in ("cat", "dog")]
        if generator.random() < 0.5:
            include[0]["color"] = "red"
        if generator.random() < 0.5:
            include[1]["position"] = [RELATIONS[generator.integers(4)], 0]
        line = {"include": include, "exclude": [{"class": "cat", "count": 3}], "tag": "x"}
        objects = {
            name: [at(*generator.uniform(0, 60, 2), size=generator.uniform(5, 20)) for _ in range(number)]
            for name in ("cat", "dog")
            if (number := int(generator.choice([0, 1, 1, 1, 2, 2, 3])))
        }
        shown = {
            id(found): str(generator.choice(["red", "blue"], p=[0.8, 0.2])) for of in objects.values() for found in of
        }

        def colours_of(found: Sequence[DetectedObject], name: str, shown=shown) -> list[str]:
            return [shown[id(each)] for each in found]

        checked = requirements("made up", line)
        correct, strict, score = reference(line, objects, colours_of)
        assert is_correct(checked, objects, colours_of, 0.1) == correct
        assert soft_score(checked, objects, colours_of, 0.1) == (pytest.approx(score), strict)
        seen["correct"].add(correct)
        seen["strict"].add(strict)
    assert seen == {"correct": {True, False}, "strict": {True, False}}


def reference(line: dict, objects: dict, colours_of) -> tuple[bool, bool, float]:  # noqa: C901 (the authors' loop)
    """The verdicts in the order of the authors' loops: GenEval's `evaluate`, Flow-GRPO's `evaluate_reward`."""
    verdicts, scores = [], []
    for exact in (False, True):
        correct, groups = True, []
        for asked in line["include"]:
            matched, found = True, objects.get(asked["class"], [])
            if exact:
                scores.append(1 - abs(asked["count"] - len(found)) / asked["count"])
            else:
                found = found[: asked["count"]]
            if len(found) != asked["count"]:
                correct = matched = False
                if exact and ("color" in asked or "position" in asked):
                    scores.append(0.0)
            else:
                if "color" in asked:
                    number = colours_of(found, asked["class"]).count(asked["color"])
                    if exact:
                        scores.append(1 - abs(asked["count"] - number) / asked["count"])
                    if number != asked["count"]:
                        correct = matched = False
                if "position" in asked and matched:
                    relation, target = asked["position"]
                    if groups[target] is None:
                        correct = matched = False
                        scores += [0.0] if exact else []
                    else:
                        if not all(relation in where(one, other) for one in found for other in groups[target]):
                            correct = matched = False
                            scores += [0.0] if exact else []
                        scores += [1.0] if exact else []
            groups.append(found if matched else None)
        if not exact:
            for asked in line["exclude"]:
                correct &= len(objects.get(asked["class"], [])) < asked["count"]
        verdicts.append(correct)
    return verdicts[0], verdicts[1], sum(scores) / len(scores)


def where(one: DetectedObject, other: DetectedObject) -> set[str]:
    """GenEval's `relative_position`, number by number."""
    (a, b, c, d), (e, f, g, h) = one.box, other.box
    x, y = (a + c) / 2 - (e + g) / 2, (b + d) / 2 - (f + h) / 2
    u = math.copysign(max(abs(x) - 0.1 * (c - a + g - e), 0), x)
    v = math.copysign(max(abs(y) - 0.1 * (d - b + h - f), 0), y)
    if abs(u) < 1e-3 and abs(v) < 1e-3:
        return set()
    u, v = u / math.hypot(x, y), v / math.hypot(x, y)
    return {name for name, holds in zip(RELATIONS, (u < -0.5, u > 0.5, v < -0.5, v > 0.5), strict=True) if holds}
