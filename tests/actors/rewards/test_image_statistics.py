"""Statistics of an image against numbers worked out by hand."""

import numpy as np
import pytest

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.recipe.registry import build

BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def measured(name: str, *rows: list, **keys: float) -> list[float]:
    images = np.array(rows, dtype=np.uint8)
    reward = build(REWARDS, {"name": name, **keys}, "reward")
    return reward.load("cpu")(images, [""] * len(images), [{}] * len(images)).tolist()


def test_brightness_is_the_mean_luma() -> None:
    # Three quarters of a white image; and what red, green and blue weigh, one by one.
    assert measured("brightness", [[WHITE, WHITE], [WHITE, BLACK]]) == [0.75]
    primaries = measured("brightness", [[RED]], [[GREEN]], [[BLUE]], [[BLACK]], [[WHITE]])
    assert primaries == pytest.approx([0.299, 0.587, 0.114, 0, 1], abs=1e-7)


def test_colorfulness_of_gray_is_nothing_and_of_red_and_green_by_hand() -> None:
    assert measured("colourfulness", [[(7, 7, 7), (90, 90, 90)]]) == [0]
    # Pure red everywhere: rg = 255, yb = 127.5, no spread: 0.3 · sqrt(255² + 127.5²) = 0.3 · 285.0987
    assert measured("colourfulness", [[RED, RED]]) == pytest.approx([85.52961], abs=1e-4)
    # Red beside green: rg = ±255 (spread 255, mean 0), yb = 127.5 twice: 255 + 0.3 · 127.5
    assert measured("colourfulness", [[RED, GREEN]]) == pytest.approx([293.25], abs=1e-4)
    # Blue beside yellow: yb = -255 and 255, rg = 0: 255
    assert measured("colourfulness", [[BLUE, (255, 255, 0)]]) == pytest.approx([255], abs=1e-4)


def test_sharpness_of_one_bright_pixel_by_hand() -> None:
    image = np.zeros((3, 3, 3), np.uint8)
    image[1, 1] = 10
    # The Laplacian is -40 in the middle, 10 at its four neighbours, 0 in the corners: mean 0, (1600 + 4 · 100) / 9
    assert measured("sharpness", image.tolist()) == pytest.approx([2000 / 9], rel=1e-6)
    # An edge 0 | 100 over two columns: +100 and -100 with the edge repeated, so the variance is 100²
    assert measured("sharpness", [[BLACK, (100, 100, 100)]]) == [10_000]
    assert measured("sharpness", [[WHITE, WHITE]]) == [0]


def test_edge_density_is_the_share_of_pixels_on_a_slope() -> None:
    # A step from 0 to 100: Sobel's slope is 4 · 100 in the columns beside the step, 8 · 12.75 = 102 is the least.
    step = [[BLACK, BLACK, (100,) * 3, (100,) * 3]] * 4
    assert measured("edge_density", step) == [0.5] and measured("edge_density", step, above=0.2) == [0]
    assert measured("edge_density", [[BLACK, (25,) * 3]] * 2, [[BLACK, (26,) * 3]] * 2) == [0, 1]  # 4 · 25 and 4 · 26
    assert measured("edge_density", [[WHITE, WHITE]]) == [0]
    # One bright pixel of 10: a slope of 20 beside it and of √2 · 10 at the corners, none in the middle
    image = np.zeros((3, 3, 3), np.uint8)
    image[1, 1] = 10
    found = [measured("edge_density", image.tolist(), above=slope / 8 / 255)[0] for slope in (14.0, 15.0, 20.5)]
    assert found == pytest.approx([8 / 9, 4 / 9, 0])


def test_entropy_counts_the_bits_of_the_gray_levels() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert measured("entropy", ramp.tolist()) == [8]
    assert measured("entropy", [[BLACK, BLACK], [BLACK, BLACK]], [[BLACK, WHITE], [WHITE, BLACK]]) == [0, 1]
    # Levels in shares of 1/2, 1/4 and 1/4: 0.5 · 1 + 2 · 0.25 · 2 bits
    assert measured("entropy", [[BLACK, BLACK], [WHITE, (9, 9, 9)]]) == [1.5]


def test_dark_share_counts_pixels_under_the_threshold() -> None:
    # 25/255 = 0.098 is under 0.1, and 26/255 = 0.102 is not.
    image = [[(25, 25, 25), (26, 26, 26)], [BLACK, WHITE]]
    assert measured("dark_share", image) == [0.5]
    assert measured("dark_share", image, below=0.05) == [0.25]
    assert measured("dark_share", image, below=1.0) == [0.75]  # white itself is not under white


@pytest.mark.parametrize("below", [0, 1.1])
def test_a_threshold_that_is_no_luma_is_refused(below: float) -> None:
    with pytest.raises(ValueError, match=f"reward.below is {below}: input should be"):
        build(REWARDS, {"name": "dark_share", "below": below}, "reward")
