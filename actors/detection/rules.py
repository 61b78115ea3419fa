"""GenEval's rules (Ghosh et al. 2023, `evaluate_images.py`) and Flow-GRPO's soft score, as pure functions.

Objects by class are sorted by falling confidence. Colours come from a function, because the rules ask for few of them.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ray_ddpo.actors.detection.detector import Box, DetectedObject
from ray_ddpo.actors.detection.requirements import Included, Requirements

Objects = Mapping[str, Sequence[DetectedObject]]
ColoursOf = Callable[[Sequence[DetectedObject], str], list[str]]  # objects and their class -> their colours
POSITION_THRESHOLD = 0.1
SAME_PLACE = 1e-3  # pixels


def iou(first: Box, second: Box) -> float:
    """Return intersection over union of two boxes whose last pixel is included, as the authors count."""

    def area(box: Sequence[float]) -> float:
        return float(max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0))

    common = area([*np.maximum(first[:2], second[:2]), *np.minimum(first[2:], second[2:])])
    union = area(first) + area(second) - common
    return common / union if union else 0.0


def kept_objects(
    objects: Sequence[DetectedObject], threshold: float, max_objects: int, max_overlap: float
) -> list[DetectedObject]:
    """Return the objects that count, by falling confidence.

    Args:
        objects: of one class.
        threshold: objects with this confidence or less do not count.
        max_objects: at most so many are looked at.
        max_overlap: of two objects whose boxes have this IoU or more, the less confident one does not count. 1: both.
    """
    candidates = sorted(objects, key=lambda found: -found.score)
    candidates = [found for found in candidates if found.score > threshold][:max_objects]
    kept: list[DetectedObject] = []
    for found in candidates:
        if max_overlap == 1 or all(iou(found.box, other.box) < max_overlap for other in kept):
            kept.append(found)
    return kept


def relative_position(first: Box, second: Box, threshold: float = POSITION_THRESHOLD) -> set[str]:
    """Return where `first` is relative to `second`: none, one or two of left of, right of, above, below.

    The offset of the centres counts as far as it exceeds `threshold` times the sum of both sizes, and a direction counts
    if that is over half of the distance.
    """
    a, b = np.array(first, float).reshape(2, 2), np.array(second, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < SAME_PLACE).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    said = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in said.items() if holds}


def is_correct(wanted: Requirements, objects: Objects, colours_of: ColoursOf, threshold: float) -> bool:
    """Return the authors' verdict: enough objects of each kind, and none too many of an excluded one.

    Colour and position are those of the most confident `count` objects.
    """
    matched: list[Sequence[DetectedObject] | None] = []
    for each in wanted.include:
        found = objects.get(each.name, [])[: each.count]
        holds = len(found) >= each.count
        if holds and each.color is not None:
            holds = colours_of(found, each.name).count(each.color) >= each.count
        if holds and each.position is not None:
            holds = _is_placed(each, found, matched, threshold)
        matched.append(found if holds else None)
    too_many = any(len(objects.get(each.name, [])) >= each.count for each in wanted.exclude)
    return None not in matched and not too_many


def soft_score(wanted: Requirements, objects: Objects, colours_of: ColoursOf, threshold: float) -> tuple[float, bool]:
    """Return Flow-GRPO's score, up to 1 and below 0 if far too many objects are there, and its strict verdict.

    The score is the mean of partial scores (`reward_server/gen_eval.py`): 1 - |count - found| / count for each kind of
    objects; the same for those of the right colour; and for a position 1, and also 0 if it is wrong. If the count is
    wrong, colour and position together count as one 0. The strict verdict needs exactly `count` objects.
    """
    parts: list[float] = []
    matched: list[Sequence[DetectedObject] | None] = []
    for each in wanted.include:
        found = objects.get(each.name, [])
        parts.append(_share(each.count, len(found)))
        holds = len(found) == each.count
        if not holds and (each.color is not None or each.position is not None):
            parts.append(0.0)
        if holds and each.color is not None:
            coloured = colours_of(found, each.name).count(each.color)
            parts.append(_share(each.count, coloured))
            holds = coloured == each.count
        if holds and each.position is not None:
            has_target = matched[each.position[1]] is not None
            holds = _is_placed(each, found, matched, threshold)
            # A wrong position adds 0 and then 1, as in the authors' loop; without its target, it adds 0 alone.
            parts += [1.0] if holds else [0.0, 1.0] if has_target else [0.0]
        matched.append(found if holds else None)
    return sum(parts) / len(parts), None not in matched


def _share(wanted: int, found: int) -> float:
    return 1 - abs(wanted - found) / wanted


def _is_placed(
    wanted: Included,
    found: Sequence[DetectedObject],
    matched: Sequence[Sequence[DetectedObject] | None],
    threshold: float,
) -> bool:
    """Return whether every object is where it should be, relative to every object of an earlier entry that matched."""
    assert wanted.position is not None
    relation, target = wanted.position
    others = matched[target]
    return others is not None and all(
        relation in relative_position(each.box, other.box, threshold) for each in found for other in others
    )
