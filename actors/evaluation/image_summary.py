"""Image statistics that need no reward: darkness, edges, sharpness, entropy, and diversity within a prompt."""

import math
from itertools import combinations

import numpy as np

from ray_ddpo.actors.rewards.image_statistics import DarkShare, EdgeDensity, Entropy, ImageStatistic, Sharpness
from ray_ddpo.common.clips import Pixels, some_frames
from ray_ddpo.common.trajectory import thumbnails

FRAMES = 4  # of a clip, at equal distances


def image_summary(pixels: Pixels, prompts: list[str]) -> dict[str, float]:
    """Compute the mean of each statistic over the images, and their diversity within a prompt.

    Of a clip, FRAMES frames have the statistics, and the poster has the diversity.
    Diversity is NaN if no prompt has two images. Without images, every value is NaN.
    """
    statistics: dict[str, ImageStatistic] = {
        "dark_share": DarkShare(),
        "edge_density": EdgeDensity(),
        "sharpness": Sharpness(),
        "entropy": Entropy(),
    }
    if not len(pixels):
        return dict.fromkeys([*statistics, "diversity"], math.nan)
    means = {
        name: float(np.mean([each.of(image) for image in some_frames(pixels, FRAMES)]))
        for name, each in statistics.items()
    }
    return means | {"diversity": diversity(pixels, prompts)}


def diversity(pixels: Pixels, prompts: list[str]) -> float:
    """Compute how much images, or posters of clips, of one prompt differ.

    Diversity falls if a policy samples the same image over and over.

    Returns:
        The root mean square difference (0 … 1) of two images reduced to 16 × 16 pixels: the mean over all pairs of a
        prompt, then over prompts. NaN if no prompt has two images.
    """
    small = thumbnails(pixels).astype(np.float64) / 255
    means = []
    for prompt in dict.fromkeys(prompts):
        pairs = combinations(small[[text == prompt for text in prompts]], 2)
        if differences := [np.sqrt(np.square(one - other).mean()) for one, other in pairs]:
            means.append(float(np.mean(differences)))
    return float(np.mean(means)) if means else math.nan
