"""Images and clips as arrays: which frame stands for a clip, and frames at equal distances.

An array [B, H, W, 3] holds images, an array [B, F, H, W, 3] clips of F frames. Functions on `Pixels` take both.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

Pixels = UInt8[np.ndarray, "B *F H W 3"]
Image = UInt8[np.ndarray, "H W 3"]
Clip = UInt8[np.ndarray, "F H W 3"]
ImageOrClip = UInt8[np.ndarray, "*F H W 3"]


def are_clips(pixels: Pixels) -> bool:
    """Return whether the array holds clips, not images."""
    return pixels.ndim == 5


def is_clip(pixels: ImageOrClip) -> bool:
    """Return whether the array is a clip, not an image."""
    return pixels.ndim == 4


def poster(pixels: ImageOrClip) -> Image:
    """Return the image that stands for a clip: its middle frame, the later one of two. An image stands for itself."""
    return pixels[len(pixels) // 2] if is_clip(pixels) else pixels


def posters(pixels: Pixels) -> UInt8[np.ndarray, "B H W 3"]:
    """Return the image that stands for each clip. Images stay as they are."""
    return pixels[:, pixels.shape[1] // 2] if are_clips(pixels) else pixels


def equally_distant(num_frames: int, count: int) -> list[int]:
    """Return at most `count` frames at equal distances, the first and the last among them; of one, the middle frame."""
    if count == 1:
        return [num_frames // 2]
    return sorted({round(frame) for frame in np.linspace(0, num_frames - 1, min(count, num_frames)).tolist()})


def mosaic(rows: Sequence[UInt8[np.ndarray, "B F H W 3"]]) -> UInt8[np.ndarray, "F H2 W2 3"]:
    """Return one clip that shows rows of clips of one size beside and below each other."""
    return np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)


def some_frames(pixels: Pixels, count: int) -> UInt8[np.ndarray, "M H W 3"]:
    """Return `count` frames of each clip at equal distances, as images. Images stay as they are."""
    if not are_clips(pixels):
        return pixels
    chosen = pixels[:, equally_distant(pixels.shape[1], count)]
    return chosen.reshape(-1, *pixels.shape[2:])
