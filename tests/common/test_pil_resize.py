"""The resize is PIL's own, bit for bit, for every pair of sizes and every part of the result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_ddpo.common.image_models.clip_preprocessing import Span, bicubic, resize

LENGTHS = st.integers(1, 60)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(height=LENGTHS, width=LENGTHS, new_height=LENGTHS, new_width=LENGTHS)
def test_every_pair_of_sizes_gives_pils_bits(height: int, width: int, new_height: int, new_width: int) -> None:
    image = noise(height, width)
    rows, columns = Span(height, new_height, 0, new_height), Span(width, new_width, 0, new_width)
    ours = resize(torch.from_numpy(image), rows, columns)[0].permute(1, 2, 0).numpy()
    pils = np.array(Image.fromarray(image[0]).resize((new_width, new_height), Image.Resampling.BICUBIC))
    assert np.array_equal(ours, pils)


def test_a_part_is_cut_from_the_whole() -> None:
    image = torch.from_numpy(noise(40, 90))
    whole = resize(image, Span(40, 25, 0, 25), Span(90, 60, 0, 60))
    part = resize(image, Span(40, 25, 3, 10), Span(90, 60, 20, 15))
    assert torch.equal(part, whole[:, :, 3:13, 20:35])


def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    images = torch.from_numpy(np.concatenate([noise(30, 30), 255 - noise(30, 30)]))
    span = Span(30, 12, 0, 12)
    alone = [resize(images[place : place + 1], span, span) for place in range(2)]
    assert torch.equal(resize(images, span, span), torch.cat(alone))


@pytest.mark.parametrize(
    ("distance", "weight"), [(0.0, 1), (1.0, 0), (2.0, 0), (3.0, 0), (0.5, 0.5625), (-1.5, -0.0625)]
)
def test_the_filter_has_the_values_of_keys_paper(distance: float, weight: float) -> None:
    assert bicubic(np.array([distance])).item() == weight  # at 1/2: 1.5/8 - 2.5/4 + 1
