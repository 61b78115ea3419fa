"""The detector of shapes finds what was drawn, also in degraded images."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.rendered_truth import GROUNDS, RGB, degraded, random_shapes, shapes_image
from ray_ddpo.actors.detection.shapes import ShapeDetector, find_shapes, nearest_name, to_lab


def seen(image: np.ndarray) -> Counter:
    """Return how many objects of each shape and colour the detector sees."""
    detector = ShapeDetector("cpu")
    (found,) = detector.detect([image], [{"circle"}])
    return Counter(
        (name, colour) for name, objects in found.items() for colour in detector.colours(image, objects, name)
    )


@pytest.mark.parametrize(("kind", "least"), [("clean", 10), ("rotated", 10), ("blurred", 10), ("noisy", 7)])
def test_random_shapes_are_counted_and_named(kind: str, least: int) -> None:
    generator = np.random.default_rng(5)
    right = 0
    for place in range(10):
        placed = random_shapes(1 + place % 5, generator)
        image = degraded(shapes_image(placed, 64, GROUNDS[place % len(GROUNDS)]), kind, generator)
        right += seen(image) == Counter((shape, colour) for shape, colour, *_ in placed)
    assert right >= least, right


@pytest.mark.parametrize("side", [64, 100, 512])
def test_a_box_holds_the_shape_at_every_size(side: int) -> None:
    image = shapes_image([("square", "blue", 0.3, 0.6, 0.2), ("circle", "red", 0.7, 0.3, 0.25)], side)
    found = find_shapes(image)
    for name, edges in (("square", (0.2, 0.5, 0.4, 0.7)), ("circle", (0.575, 0.175, 0.825, 0.425))):
        (only,) = found[name]
        assert np.abs(np.array(only.box) / side - edges).max() < 0.035
        assert only.mask is not None and only.mask.shape == (side, side)


def test_shapes_of_different_colours_are_told_apart_where_they_touch() -> None:
    image = shapes_image([("square", "blue", 0.35, 0.5, 0.3), ("square", "red", 0.65, 0.5, 0.3)], 64)
    assert seen(image) == Counter({("square", "blue"): 1, ("square", "red"): 1})


def test_a_plain_or_noisy_image_and_a_line_have_no_shapes() -> None:
    line = np.full((64, 64, 3), 190, np.uint8)
    line[30:33, 5:60] = (220, 30, 30)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for image in (np.full((64, 64, 3), 190, np.uint8), line, noise):
        assert not find_shapes(image)


def test_a_colour_has_the_name_of_its_point() -> None:
    for name, rgb in RGB.items():
        assert nearest_name(to_lab(np.array(rgb, float))) == name


def test_lab_of_known_colours() -> None:
    """White, black and the primaries of sRGB, by Lindbloom's calculator (D65)."""
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], float)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(to_lab(rgb), expected, atol=0.05)


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'shapes' does not know \['cat'\]: it knows \['circle'"):
        ShapeDetector("cpu").detect([np.zeros((64, 64, 3), np.uint8)], [{"cat", "circle"}])
