"""What is rewarded: ink; and what is only looked at: whether a digit can still be read."""

from functools import cache
from typing import Any

import numpy as np
from digits_policy import digit_of
from jaxtyping import Float, UInt8
from pretrain_digits import FONTS, drawn

Pictures = UInt8[np.ndarray, "B H W 3"]


def ink(images: Pictures, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
    """The share of white."""
    return images.mean(axis=(1, 2, 3)) / 255


def reads(images: Pictures, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
    """1 where the picture is more like a printed one of the digit that was asked for than of any other, else 0."""
    asked = np.array([digit_of(prompt) for prompt in prompts])
    found = (_unit(images[..., 0]) @ _printed(images.shape[1]).T).argmax(axis=1)
    return (found // len(FONTS) == asked).astype(np.float32)


@cache
def _printed(side: int) -> Float[np.ndarray, "D N"]:
    """Each digit in each font, in that order."""
    small = np.stack([drawn(digit, font, 15, 0, (0, 0)) for digit in range(10) for font in FONTS])
    return _unit(np.kron(small, np.ones((side // small.shape[1],) * 2)))


def _unit(pictures: np.ndarray) -> Float[np.ndarray, "N D"]:
    """Of mean 0 and length 1, so that a product of two is their correlation."""
    rows = pictures.reshape(len(pictures), -1).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
