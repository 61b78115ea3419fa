"""The size of a JPEG file: known to the byte for a known image, and the right way round."""

import io

import numpy as np
import pytest
from PIL import Image

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.jpeg import jpeg_kilobytes
from ray_ddpo.common.recipe.registry import build


@pytest.fixture
def flat_and_noisy() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return np.stack([np.full((64, 64, 3), 200, np.uint8), noise])


def score(name: str, images: np.ndarray) -> np.ndarray:
    return build(REWARDS, {"name": name}, "reward").load("cpu")(images, ["cat"] * len(images), [{}] * len(images))


def test_a_kilobyte_is_a_thousand_bytes_of_a_file_of_quality_95(flat_and_noisy: np.ndarray) -> None:
    for image, kilobytes in zip(flat_and_noisy, jpeg_kilobytes(flat_and_noisy), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=95)
        assert kilobytes == pytest.approx(len(file.getvalue()) / 1000)


def test_noise_takes_many_times_the_bytes_of_one_color(flat_and_noisy: np.ndarray) -> None:
    flat, noisy = jpeg_kilobytes(flat_and_noisy)
    assert 0.5 < flat < 1 and 5 < noisy < 12


def test_compressibility_prefers_the_flat_image_and_incompressibility_the_noise(flat_and_noisy: np.ndarray) -> None:
    compressibility = score("jpeg_compressibility", flat_and_noisy)
    incompressibility = score("jpeg_incompressibility", flat_and_noisy)
    assert compressibility[0] > compressibility[1]
    assert incompressibility.tolist() == (-compressibility).tolist()
    assert (incompressibility > 0).all()
