"""Picture statistics with gradients: brightness, colourfulness and sharpness of images from 0 to 1."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d

from ray_ddpo.common.differentiable_reward import grey_levels_with_gradient, straight_through

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
LEAST = 1e-12  # under a root, whose gradient at 0 would be infinite


def brightness(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
    """Return the mean luma: 0 black, 1 white."""
    return _luma(grey_levels_with_gradient(pixels)).flatten(1).mean(1) / 255


def colourfulness(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
    """Return the perceived colourfulness (Hasler and Süsstrunk 2003, M3)."""
    red, green, blue = grey_levels_with_gradient(pixels).flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = rg.var(1, correction=0) + yb.var(1, correction=0)
    return (spread + LEAST).sqrt() + 0.3 * (rg.mean(1).square() + yb.mean(1).square() + LEAST).sqrt()


def sharpness(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
    """Return the variance of the Laplacian of the grey levels (Pech-Pacheco et al. 2000)."""
    luma = _luma(grey_levels_with_gradient(pixels))
    grey = straight_through(luma, (luma + 0.5).floor()).unsqueeze(1)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=grey.dtype, device=grey.device)
    # Not `pad(mode="replicate")`, whose gradient has no deterministic kernel on a GPU.
    wide = torch.cat([grey[..., :1], grey, grey[..., -1:]], -1)
    laplacian = conv2d(torch.cat([wide[..., :1, :], wide, wide[..., -1:, :]], -2), kernel.view(1, 1, 3, 3))
    return laplacian.flatten(1).var(1, correction=0)


def _luma(levels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B H W"]:
    return (levels * torch.tensor(LUMA, dtype=levels.dtype, device=levels.device).view(3, 1, 1)).sum(1)
