"""The reward edit_preservation by hand: what is outside the mask, or everything without a mask."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.actors.rewards.edit_preservation import EditPreservation, preserved
from ray_ddpo.common.prompts import File, Prompt
from tests.input_files import input_mask, input_pixels, save_inputs

MASK = np.array([[True, False], [False, False]])


def test_only_what_is_outside_the_mask_counts() -> None:
    before = np.zeros((2, 2, 3), np.uint8)
    image = before.copy()
    image[0, 0] = 255  # may change
    assert preserved(image, before, MASK) == 1.0
    image[1, 1] = (51, 0, 0)  # a fifth of one of nine values
    assert preserved(image, before, MASK) == pytest.approx(1 - 0.2 / 9)
    assert preserved(image, before, ~MASK) == 0.0


def test_without_a_mask_the_complete_image_counts_and_under_a_full_one_nothing() -> None:
    before, image = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert preserved(image, before, np.zeros((2, 2), bool)) == pytest.approx(0.8)
    assert preserved(image, before, np.ones((2, 2), bool)) == 1.0


def test_each_image_is_compared_with_the_input_of_its_prompt(tmp_path: Path) -> None:
    file = str(save_inputs(tmp_path))
    prompts = File(path=file, image_column="image", mask_column="mask").sampled()
    images = np.stack([input_pixels(number) for number in (0, 2)])
    images[0][input_mask(0)] ^= 255
    images[1][~input_mask(2)] ^= 255
    scores = EditPreservation().load("cpu")(images, ["a", "b"], [prompts[row].metadata for row in (0, 2)])
    assert scores[0] == 1.0 and scores[1] < 0.6
    unmasked = File(path=file, image_column="image").sampled()
    assert EditPreservation().load("cpu")(images[:1], ["a"], [unmasked[0].metadata])[0] < 0.8


def test_prompts_without_an_input_image_are_refused_before_a_run() -> None:
    with pytest.raises(ValueError, match="the reward edit_preservation reads each prompt's input image, and 'cat' has"):
        EditPreservation().check_prompts([Prompt("cat")])
