"""The page's images, in the page itself: pairs with the same noise, and the worst and the best."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.deploy.commands.report.lettering import lettering

PAIRS = 36  # of the gallery
EXTREMES = 6  # of the worst, and of the best
LOSSLESS_EDGE = 128  # pixels: a smaller image is kept as it is
EDGE = 384  # a larger one is shown so large
QUALITY = 88


@dataclass(frozen=True)
class TransitionIndex:
    """One held-out image before and after, as data URIs, with its score."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float
    width: int
    height: int
    number: str = ""  # that stands in the place of the prompt in before_after.png

    @property
    def change(self) -> float:
        return self.reward_after - self.reward_before


def gallery(comparison: Comparison, score: str) -> list[TransitionIndex]:
    """The first pairs in the order of the evaluation set, so that nobody chose them, with a score's values."""
    shown = min(PAIRS, len(comparison.before))
    prompts = [prompt.text for prompt in comparison.chosen.prompts[:shown]]
    written = lettering(prompts).numbers
    return [replace(_pair(comparison, score, index), number=written[index]) for index in range(shown)]


def worst_and_best(comparison: Comparison, score: str) -> tuple[list[TransitionIndex], list[TransitionIndex]]:
    """The pairs with the lowest and with the highest score after, each from the extreme on; never one twice."""
    values = comparison.scores_after[score]
    ranked = [int(index) for index in np.argsort(values, kind="stable") if np.isfinite(values[index])]
    shown = min(EXTREMES, len(ranked) // 2)
    lowest, highest = ranked[:shown], ranked[::-1][:shown]
    return [_pair(comparison, score, index) for index in lowest], [_pair(comparison, score, index) for index in highest]


def are_reduced(images: UInt8[np.ndarray, "N H W 3"]) -> bool:
    """Whether the page shows the images smaller or less exactly than they were sampled."""
    return max(images.shape[1:3]) > LOSSLESS_EDGE


def data_uri(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """An image as a URI that holds it: PNG where it is small, else WebP."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= LOSSLESS_EDGE:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((EDGE, EDGE))
        image.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pair(comparison: Comparison, score: str, index: int) -> TransitionIndex:
    height, width = comparison.before[index].shape[:2]
    return TransitionIndex(
        comparison.chosen.prompts[index].text,
        data_uri(comparison.before[index]),
        data_uri(comparison.after[index]),
        float(comparison.scores_before[score][index]),
        float(comparison.scores_after[score][index]),
        width,
        height,
    )
