"""What can be told of an evaluation's images without a reward: dark, flat, all alike."""

import math

import numpy as np
from jaxtyping import UInt8

from ray_ddpo.actors.evaluation.diversity import diversity
from ray_ddpo.actors.rewards.image_statistics import DarkShare, Entropy, Sharpness


def image_summary(pixels: UInt8[np.ndarray, "N H W 3"], prompts: list[str]) -> dict[str, float]:
    """Means over the images of their statistics, and how much those of one prompt differ (NaN where it has one).

    Without any image all are NaN.
    """
    statistics = {"dark_share": DarkShare(), "sharpness": Sharpness(), "entropy": Entropy()}
    if not len(pixels):
        return dict.fromkeys([*statistics, "diversity"], math.nan)
    means = {name: float(np.mean([each.of(image) for image in pixels])) for name, each in statistics.items()}
    return means | {"diversity": diversity(pixels, prompts)}
