"""Rendering of drawings: position, scale and white background."""

import numpy as np

from ray_ddpo.learner.pretraining.drawings import Drawing, prompted_animals

SQUARE = Drawing("cat", "hand-made", "square", '<rect x="4" y="4" width="8" height="8" fill="#ff0000"/>', 16.0, 16.0)
RED, WHITE = [255, 0, 0], [255, 255, 255]


def test_a_drawing_is_rendered_on_white_at_its_position() -> None:
    image = SQUARE.render(32)
    assert image.shape == (32, 32, 3)
    assert image[16, 16].tolist() == RED
    assert image[2, 2].tolist() == WHITE
    assert np.all(image == RED, axis=-1).mean() == 0.25  # half the side, a quarter of the area


def test_scale_makes_it_larger_and_shift_moves_it_to_the_right_and_down() -> None:
    assert np.all(SQUARE.render(32, scale=2.0) == RED)
    rows, columns = np.nonzero(np.all(SQUARE.render(32, shift=(0.25, 0.125)) == RED, axis=-1))
    assert (rows.min(), columns.min()) == (12, 16)


def test_the_prompts_are_the_45_animals() -> None:
    assert len(prompted_animals()) == len(set(prompted_animals())) == 45
