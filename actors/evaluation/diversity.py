"""Diversity of the images of a prompt, which a policy loses if it samples the same image over and over."""

import math
from itertools import combinations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

EDGE = 16  # pixels of the small image, so that composition and colors are compared, not texture


def diversity(pixels: UInt8[np.ndarray, "N H W 3"], prompts: list[str]) -> float:
    """Return the root mean square difference of two images of a prompt, 0 … 1, averaged over pairs, then prompts.

    Images are reduced to 16 × 16 first. NaN if no prompt has two images.
    """
    small = np.stack([_reduced(image) for image in pixels])
    of_prompts = [small[[text == prompt for text in prompts]] for prompt in dict.fromkeys(prompts)]
    means = [_mean_difference(images) for images in of_prompts if len(images) > 1]
    return float(np.mean(means)) if means else math.nan


def _reduced(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "E E 3"]:
    return np.asarray(Image.fromarray(image).resize((EDGE, EDGE), Image.Resampling.BOX), np.float64) / 255


def _mean_difference(images: Float[np.ndarray, "N E E 3"]) -> float:
    return float(np.mean([np.sqrt(np.square(one - other).mean()) for one, other in combinations(images, 2)]))
