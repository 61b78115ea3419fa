"""CLIP's preprocessing with gradients: the resize of PIL as two matrix products, whose rounding is straight-through."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ray_ddpo.common.differentiable_reward import grey_levels_with_gradient, straight_through
from ray_ddpo.common.image_models.clip_preprocessing import BITS, MEAN, STD, Span, resize_order, spans_of, taps


def clip_pixels_with_gradient(
    pixels: Float[Tensor, "B 3 H W"], side: int = 224, whole: bool = False
) -> Float[Tensor, "B 3 {side} {side}"]:
    """Return CLIP's input of images from 0 to 1. The values are those of `clip_pixels` for the rounded images."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    levels = grey_levels_with_gradient(pixels)
    rows, columns, margins = spans_of(tuple(levels.shape[2:]), side, whole)
    for dimension, span in resize_order(rows, columns):
        levels = _resize_along(dimension, levels, span)
    return (pad(levels, margins).float() / 255 - mean) / std


def _resize_along(dimension: int, levels: Float[Tensor, "B 3 _ _"], span: Span) -> Float[Tensor, "B 3 _ _"]:
    """Resize one side. Float64 holds PIL's sums of fixed-point weights exactly, so that the rounded levels are PIL's."""
    moved = levels.double().movedim(dimension, -1) @ _matrix(span).to(levels.device)
    return straight_through(moved, (moved + 0.5).floor()).clamp(0, 255).movedim(-1, dimension)


def _matrix(span: Span) -> Float[Tensor, "length count"]:
    """Return the weights of each old pixel in each new one."""
    places, weights = taps(span)
    matrix = torch.zeros(span.length, span.count, dtype=torch.float64)
    columns = torch.arange(span.count).expand(len(places), -1)
    values = torch.from_numpy(weights.astype("float64")) / (1 << BITS)
    return matrix.index_put((torch.from_numpy(places), columns), values, accumulate=True)


def resized_with_gradient(pixels: Float[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """Return what `interpolate(mode="bicubic", antialias=True)` does to 6 decimal places.

    The gradient of these matrix products is deterministic on a GPU, and that of `interpolate` is not.
    """
    for dimension in (3, 2):
        matrix = _matrix(Span(pixels.shape[dimension], side, 0, side)).to(pixels)
        pixels = (pixels.movedim(dimension, -1) @ matrix).movedim(-1, dimension)
    return pixels
