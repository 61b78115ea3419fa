"""CLIP's image preprocessing for a batch on its device: resize, center crop, normalize."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ray_ddpo.common.image_models.pil_resize import Span, resize

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in CLIP's training images, in 0 … 1
STD = (0.26862954, 0.26130258, 0.27577711)


def rgb_pixels(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Convert an image of any mode as CLIPProcessor does: transparency on white, EXIF orientation ignored."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def clip_pixels(
    images: UInt8[Tensor, "B H W 3"], side: int = 224, whole: bool = False
) -> Float[Tensor, "B 3 {side} {side}"]:
    """Return CLIP's input (Radford et al. 2021): gray levels / 255, minus the mean, divided by the standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (grey_levels(images, side, whole).float() / 255 - mean) / std


def grey_levels(images: UInt8[Tensor, "B H W 3"], side: int, whole: bool = False) -> UInt8[Tensor, "B 3 {side} {side}"]:
    """Resize the shorter side to `side` and crop the center, with results equal to CLIPProcessor's with PIL.

    If `whole`, resize the longer side to `side` and pad with black instead, as open_clip's `ResizeMaxSize` does.
    """
    _, height, width, _ = images.shape
    if whole:
        return _centred(
            resize(images, *(_shrunk(length, max(height, width), side) for length in (height, width))), side
        )
    return resize(images, *(_middle(length, min(height, width), side) for length in (height, width)))


def _middle(length: int, shorter: int, side: int) -> Span:
    new_length = int(side * length / shorter)
    return Span(length, new_length, start=(new_length - side) // 2, count=side)


def _shrunk(length: int, longer: int, side: int) -> Span:
    new_length = max(1, round(length * (side / longer)))
    return Span(length, new_length, start=0, count=new_length)


def _centred(levels: UInt8[Tensor, "B 3 _ _"], side: int) -> UInt8[Tensor, "B 3 {side} {side}"]:
    above, left = ((side - length) // 2 for length in levels.shape[2:])
    return pad(levels, (left, side - levels.shape[3] - left, above, side - levels.shape[2] - above))
