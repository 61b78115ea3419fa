"""The reward: ink; and a held-out scorer: whether the digit can still be read."""

from functools import cache
from typing import Any

import numpy as np
from digits_policy import digit_of
from jaxtyping import Float, Int, UInt8
from pretrain_digits import SIZE, data

Images = UInt8[np.ndarray, "B H W 3"]


def ink(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
    """Return the share of white."""
    return images.mean(axis=(1, 2, 3)) / 255


def reads(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
    """Return 1 if the most similar printed digit is the one that the prompt names, else 0."""
    zoom = images.shape[1] // SIZE
    printed, digits = _printed()
    found = digits[(_unit(images[:, ::zoom, ::zoom, 0]) @ printed.T).argmax(axis=1)]
    return (found == [digit_of(prompt) for prompt in prompts]).astype(np.float32)


@cache
def _printed() -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, "N"]]:
    """Return printed digits that the model was not trained on, and their labels."""
    images, digits = data(3000, seed=1)
    return _unit(images.numpy()), digits.numpy()


def _unit(images: np.ndarray) -> Float[np.ndarray, "N D"]:
    """Normalize images to mean 0 and length 1, so that the product of two is their correlation."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
