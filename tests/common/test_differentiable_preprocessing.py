"""CLIP's preprocessing with gradients has the values of the exact one, and the gradient of a smooth resize."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ray_ddpo.common.image_models.clip_preprocessing import STD, clip_pixels
from ray_ddpo.common.image_models.differentiable_preprocessing import (
    clip_pixels_with_gradient,
    resized_with_gradient,
)


@pytest.mark.parametrize("size", [(32, 32), (40, 64), (300, 224), (512, 384), (224, 224)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_values_are_those_of_uint8_images_to_the_bit(size: tuple[int, int], whole: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    exact = clip_pixels(torch.from_numpy(images), 224, whole)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(clip_pixels_with_gradient(pixels, 224, whole), exact)


def test_the_gradient_is_that_of_torchs_antialiased_resize() -> None:
    pixels = 0.3 + 0.4 * torch.rand(1, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    found, smooth = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    (clip_pixels_with_gradient(found, 24) * weights).sum().backward()
    resized = interpolate(smooth, (24, 24), mode="bicubic", antialias=True)
    (resized / torch.tensor(STD).view(3, 1, 1) * weights).sum().backward()
    torch.testing.assert_close(found.grad, smooth.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resized_with_gradient(pixels, 24), resized.detach(), rtol=0, atol=2e-6)
