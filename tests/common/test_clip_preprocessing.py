"""CLIP's preprocessing against the processor of transformers, which resizes with PIL."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.clip_preprocessing import MEAN, STD, clip_pixels, grey_levels

SIZES = [(224, 224), (64, 64), (97, 131), (223, 224), (225, 301), (301, 640), (512, 512), (500, 257)]


def noise_and_pattern(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    pattern = [127 + 127 * np.sin(x / 7 + y / 11), 255 * x / width, 255 * ((x // 5 + y // 3) % 2)]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([noise, np.stack(pattern, -1).astype(np.uint8)])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_of_any_size_come_out_as_from_clips_own_processor(height: int, width: int) -> None:
    from transformers import CLIPImageProcessorPil

    images = noise_and_pattern(height, width)
    expected = np.array(CLIPImageProcessorPil()(images=list(images), return_tensors="np")["pixel_values"])
    levels_apart = (
        np.abs(clip_pixels(torch.from_numpy(images)).numpy() - expected) * np.array(STD).reshape(3, 1, 1) * 255
    )
    assert levels_apart.max() < 1.01  # PIL's weights have 22 bits, so it may round a level the other way
    assert (levels_apart > 0.01).mean() < 0.02


def test_the_processor_of_transformers_has_the_constants_that_are_used_here() -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)


def test_white_and_black_are_fed_at_the_ends_of_the_range_and_not_nearly_black() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 50, 70, 3)
    black, white = clip_pixels(images)[:, :, 0, 0]
    torch.testing.assert_close(black, torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4, rtol=0)  # -mean / std
    torch.testing.assert_close(white, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4, rtol=0)  # (1 - mean) / std


def test_the_middle_of_the_longer_side_is_kept() -> None:
    image = torch.zeros(1, 32, 96, 3, dtype=torch.uint8)
    image[:, :, 32:64] = 200
    assert (grey_levels(image, 32) == 200).all()
    assert (grey_levels(image.transpose(1, 2), 32) == 200).all()


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), level=st.integers(0, 255))
def test_a_picture_of_one_colour_keeps_it_at_every_size(height: int, width: int, level: int) -> None:
    image = torch.full((1, height, width, 3), level, dtype=torch.uint8)
    assert (grey_levels(image, 32) == level).all()
