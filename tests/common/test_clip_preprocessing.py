"""CLIP's preprocessing compared with transformers' processor, which resizes with PIL: all gray levels are equal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_ddpo.common.image_models.clip_preprocessing import MEAN, STD, clip_pixels, grey_levels, rgb_pixels

SIZES = [
    (224, 224),
    (64, 64),
    (97, 131),
    (223, 224),
    (225, 301),
    (301, 640),
    (512, 512),
    (500, 257),
    (1, 1),
    pytest.param(4096, 4096, marks=pytest.mark.thorough),
]
THIN = [(700, 300), (1500, 300), (800, 223), (1, 90), (90, 1), (3, 700), (700, 3), (224, 900), (900, 224)]


def noise_and_pattern(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    pattern = [127 + 127 * np.sin(x / 7 + y / 11), 255 * x / width, 255 * ((x // 5 + y // 3) % 2)]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([noise, np.stack(pattern, -1).astype(np.uint8)])


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(("height", "width"), SIZES + THIN)
def test_images_of_any_size_equal_those_of_clips_own_processor(height: int, width: int) -> None:
    from transformers import CLIPImageProcessorPil

    images = noise_and_pattern(height, width)
    # Give the format, because an image 3 high or wide could be either.
    processed = CLIPImageProcessorPil()(images=list(images), return_tensors="np", input_data_format="channels_last")
    expected = np.array(processed["pixel_values"])
    levels_apart = (
        np.abs(clip_pixels(torch.from_numpy(images)).numpy() - expected) * np.array(STD).reshape(3, 1, 1) * 255
    )
    assert levels_apart.max() < 0.01


def image_of_mode(mode: str) -> Image.Image:
    """Return an image with every alpha if the mode has one, and with a transparent color in the palette of "P"."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 131, 4), dtype=np.uint8), mode="RGBA")
    if mode == "P":
        image = noise.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    return noise.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK"])
def test_images_of_any_mode_equal_those_of_clips_own_processor(mode: str) -> None:
    from transformers import CLIPImageProcessorPil

    image = image_of_mode(mode)
    expected = np.array(CLIPImageProcessorPil()(images=image, return_tensors="np")["pixel_values"])
    pixels = rgb_pixels(image)
    assert pixels.shape == (97, 131, 3) and pixels.dtype == np.uint8
    levels_apart = clip_pixels(torch.from_numpy(pixels)[None]).numpy() - expected
    assert np.abs(levels_apart * np.array(STD).reshape(3, 1, 1) * 255).max() < 0.01


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 0, 0))
    image.putpixel((1, 0), (200, 100, 0, 255))
    assert rgb_pixels(image).tolist() == [[[255, 255, 255], [200, 100, 0]]]


@pytest.mark.parametrize(("height", "width"), [(512, 512), (301, 640), (640, 301), (224, 100), (4, 900)])
def test_an_uncropped_image_is_pils_on_black(height: int, width: int) -> None:
    image = noise_and_pattern(height, width)[0]
    new_width, new_height = (max(1, round(length * (224 / max(height, width)))) for length in (width, height))
    small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    expected = Image.new("RGB", (224, 224))
    expected.paste(small, ((224 - new_width) // 2, (224 - new_height) // 2))
    levels = grey_levels(torch.from_numpy(image)[None], 224, whole=True)
    assert np.array_equal(levels[0].permute(1, 2, 0).numpy(), np.array(expected))


def test_a_square_image_is_the_same_padded_or_cropped() -> None:
    images = torch.from_numpy(noise_and_pattern(97, 97))
    assert torch.equal(grey_levels(images, 64, whole=True), grey_levels(images, 64))


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
def test_an_image_of_one_color_keeps_it_at_every_size(height: int, width: int, level: int) -> None:
    image = torch.full((1, height, width, 3), level, dtype=torch.uint8)
    assert (grey_levels(image, 32) == level).all()
