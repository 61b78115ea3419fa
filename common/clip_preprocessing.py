"""CLIP's own picture preprocessing, for a batch on its device: resize, centre crop, normalise."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue of the pictures CLIP learned from, in 0 … 1
STD = (0.26862954, 0.26130258, 0.27577711)


def rgb_pixels(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of any mode as CLIPProcessor takes it: what is transparent lies on white, and no EXIF tag turns it."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def clip_pixels(images: UInt8[Tensor, "B H W 3"], side: int = 224) -> Float[Tensor, "B 3 {side} {side}"]:
    """What CLIP is fed (Radford et al. 2021): grey levels / 255, less the mean, over the standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (grey_levels(images, side).float() / 255 - mean) / std


def grey_levels(images: UInt8[Tensor, "B H W 3"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """The shorter side resized to `side`, and the middle of the longer one: whole numbers 0 … 255.

    They are PIL's bicubic ones, to one grey level, up to twice as tall as wide (beyond, PIL may take columns first).
    """
    _, height, width, _ = images.shape
    shorter = min(height, width)
    new_height, new_width = int(side * height / shorter), int(side * width / shorter)
    # PIL resizes rows, then columns, each to whole grey levels: one pass, or float32, would give others.
    levels = images.permute(0, 3, 1, 2).double()
    levels = _whole(interpolate(levels, (height, new_width), mode="bicubic", antialias=True))
    levels = _whole(interpolate(levels, (new_height, new_width), mode="bicubic", antialias=True))
    top, left = (new_height - side) // 2, (new_width - side) // 2
    return levels[..., top : top + side, left : left + side]


def _whole(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor().clamp(0, 255)
