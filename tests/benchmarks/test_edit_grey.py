"""The tiny editing run: its reward and statistics by hand, its path, and that it learns to read its input image."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.edit_grey import in_errors, likeness, save_painter, save_plain_images, trained_scores
from ray_ddpo.common.input_images import InputImages


def prepared(folder: Path, steps: int, trained: range, held_out: range) -> Path:
    save_painter(folder / "model", steps)
    save_plain_images(folder / "trained", trained)
    save_plain_images(folder / "held_out", held_out)
    return folder


def test_likeness_and_standard_errors_by_hand() -> None:
    masks = np.array([[[True, False]], [[True, True]]])
    inputs = InputImages(pixels=np.full((2, 1, 2, 3), 100, np.uint8), masks=masks)
    images = np.array([[[[151] * 3, [0] * 3]], [[[100] * 3, [49, 100, 100]]]], np.uint8)
    assert likeness(images, ["", ""], [{}, {}], inputs) == pytest.approx([-0.2, -0.1 / 3])
    assert in_errors(np.array([1.0, 3.0])) == pytest.approx(2.0)


@pytest.mark.rotated(every=2, group="longest")
def test_the_path_runs_and_the_control_has_other_inputs(tmp_path: Path) -> None:
    folder = prepared(tmp_path, 2, range(4), range(10, 14))
    smaller = ["--rounds", "1", "--prompts.images_per_prompt", "2", "--sampling.batch_size", "4"]
    smaller += ["--sampling.batches_per_round", "1", "--learner.batch_size", "4", "--learner.micro_batch_size", "4"]
    scores = trained_scores(folder, 0, smaller)
    assert all(rows.shape == (4,) and (rows < 0).all() for rows in scores)
    assert not np.array_equal(scores[1], scores[2])


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_a_run_learns_to_read_its_input_image(tmp_path: Path) -> None:
    before, after, control = trained_scores(prepared(tmp_path, 400, range(32), range(1000, 1064)), 0, [])
    assert in_errors(after - before) > 3 and in_errors(control - after) < -3
    assert after.mean() > -0.16  # of the best grey that does not depend on the input, it would be -0.22
