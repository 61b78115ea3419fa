"""Simple statistics of an image, for tests and guards: brightness, colorfulness, sharpness, entropy, darkness."""

from abc import abstractmethod
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from pydantic import Field

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward

Image = UInt8[np.ndarray, "H W 3"]
LUMA = (299, 587, 114)  # thousandths of red, green and blue in luma (ITU-R BT.601)
WHITE = 255 * 1000


def luma_thousandths(image: Image) -> Int[np.ndarray, "H W"]:
    """Return the luma of each pixel, 0 … 255000, as integers, whose sums are exact in any order."""
    red, green, blue = (share * channel for share, channel in zip(LUMA, channels(image), strict=True))
    return red + green + blue


def channels(image: Image) -> list[Int[np.ndarray, "H W"]]:
    """Return red, green and blue, as integers that can be added and subtracted."""
    return [image[..., channel].astype(np.int32) for channel in range(3)]


def grey(image: Image) -> Int[np.ndarray, "H W"]:
    """Return the luma of each pixel, rounded to the gray levels 0 … 255."""
    return (luma_thousandths(image) + 500) // 1000


def mean_and_variance(values: Int[np.ndarray, "H W"]) -> tuple[float, float]:
    """Return mean and variance of all values, from exact sums."""
    count, total, squares = values.size, int(values.sum(dtype=np.int64)), int(np.square(values, dtype=np.int64).sum())
    return total / count, (count * squares - total * total) / count**2


class ImageStatistic(Reward):
    """A statistic of an image. Prompts are ignored."""

    @abstractmethod
    def of(self, image: Image) -> float:
        """Return the statistic of an image."""

    @property
    def independent_of_batch(self) -> bool:
        return True

    def load(self, device: str) -> LoadedReward:
        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return np.array([self.of(image) for image in images], dtype=np.float32)

        return score


class Brightness(ImageStatistic):
    """Mean luma of the image: 0 black, 1 white."""

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def of(self, image: Image) -> float:
        return mean_and_variance(luma_thousandths(image))[0] / WHITE

    def load_differentiable(self, device: str) -> DifferentiableReward:
        from ray_ddpo.common.image_models.differentiable_statistics import brightness

        return lambda pixels, prompts, metadata: brightness(pixels)


class Colourfulness(ImageStatistic):
    """Perceived colourfulness (Hasler and Süsstrunk 2003, M3): 0 grey, 15 slightly, 59 quite, 109 extremely."""

    def of(self, image: Image) -> float:
        red, green, blue = channels(image)
        mean_rg, variance_rg = mean_and_variance(red - green)
        mean_2yb, variance_2yb = mean_and_variance(red + green - 2 * blue)  # twice the paper's yb, as integers
        spread = np.sqrt(variance_rg + variance_2yb / 4)
        return float(spread + 0.3 * np.sqrt(mean_rg**2 + mean_2yb**2 / 4))

    def load_differentiable(self, device: str) -> DifferentiableReward:
        from ray_ddpo.common.image_models.differentiable_statistics import colourfulness

        return lambda pixels, prompts, metadata: colourfulness(pixels)


class Sharpness(ImageStatistic):
    """Variance of the Laplacian of the grey levels (Pech-Pacheco et al. 2000): 0 flat, some hundreds in focus.

    Edge pixels are repeated outside the image.
    """

    def of(self, image: Image) -> float:
        levels = np.pad(grey(image), 1, mode="edge")
        neighbours = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
        return mean_and_variance(neighbours - 4 * levels[1:-1, 1:-1])[1]

    def load_differentiable(self, device: str) -> DifferentiableReward:
        from ray_ddpo.common.image_models.differentiable_statistics import sharpness

        return lambda pixels, prompts, metadata: sharpness(pixels)


class EdgeDensity(ImageStatistic):
    """Share of pixels on an edge, where the gradient of the grey levels (Sobel) is steep: 0 flat, some tenths detailed.

    Pixels are repeated outside the image.
    """

    above: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Change from one pixel to the next, as a share of the range from black to white, above which a pixel is on an edge."""

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def of(self, image: Image) -> float:
        levels = np.pad(grey(image), 1, mode="edge")
        across, down = levels[:, 2:] - levels[:, :-2], levels[2:] - levels[:-2]
        slope_x = across[:-2] + 2 * across[1:-1] + across[2:]  # 8 times the change from one pixel to the next
        slope_y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
        return float((np.square(slope_x) + np.square(slope_y) > (8 * 255 * self.above) ** 2).mean())


class Entropy(ImageStatistic):
    """Entropy of the histogram of grey levels in bits: 0 one level, 8 all 256 equally often."""

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 8.0

    def of(self, image: Image) -> float:
        counts = np.bincount(grey(image).ravel(), minlength=256)
        present = counts[counts > 0] / counts.sum()
        return float((present * np.log2(1 / present)).sum())


class DarkShare(ImageStatistic):
    """Share of pixels whose luma is under `below`: 0 none, 1 all. It shows a run that turns its images dark."""

    below: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Luma below which a pixel counts as dark: 0 black, 1 white."""

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def of(self, image: Image) -> float:
        return float((luma_thousandths(image) < self.below * WHITE).mean())
