"""Compressibility: the size of an image's JPEG file, in kilobytes (DDPO, section 5.2)."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward

QUALITY = 95  # as in the paper's code


def jpeg_kilobytes(images: Images) -> Float[np.ndarray, "B"]:
    """Return the size of each image as a JPEG of quality 95; 1 kilobyte is 1000 bytes."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return np.array(sizes, dtype=np.float32)


class JpegCompressibility(Reward):
    """Negative size as a JPEG of quality 95, in kilobytes: smaller files are better."""

    @property
    def independent_of_batch(self) -> bool:
        return True

    def load(self, device: str) -> LoadedReward:
        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return -jpeg_kilobytes(images)

        return score


class JpegIncompressibility(Reward):
    """Size as a JPEG of quality 95, in kilobytes: larger files are better."""

    @property
    def independent_of_batch(self) -> bool:
        return True

    def load(self, device: str) -> LoadedReward:
        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return jpeg_kilobytes(images)

        return score
