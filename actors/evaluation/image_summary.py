"""Statistics of an evaluation's images without a reward: darkness, sharpness, entropy, diversity."""

import math

import numpy as np
from jaxtyping import UInt8

from ray_ddpo.actors.evaluation.diversity import diversity
from ray_ddpo.actors.rewards.image_statistics import DarkShare, Entropy, Sharpness


def image_summary(pixels: UInt8[np.ndarray, "N H W 3"], prompts: list[str]) -> dict[str, float]:
    """Return the means of the images' statistics, and their diversity.

    All are NaN if there are no images. Diversity is NaN if no prompt has two images.
    """
    statistics = {"dark_share": DarkShare(), "sharpness": Sharpness(), "entropy": Entropy()}
    if not len(pixels):
        return dict.fromkeys([*statistics, "diversity"], math.nan)
    means = {name: float(np.mean([each.of(image) for image in pixels])) for name, each in statistics.items()}
    return means | {"diversity": diversity(pixels, prompts)}
