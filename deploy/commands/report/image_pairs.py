"""Before-and-after pairs of the report page, embedded as data URIs: a gallery, and the worst and the best.

A clip is embedded as an mp4 file beside its poster.
"""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ray_ddpo.common.clips import ImageOrClip, Pixels, are_clips, is_clip, poster
from ray_ddpo.common.video_files import mp4, playable
from ray_ddpo.deploy.commands.report.images import lettering, shown_inputs
from ray_ddpo.deploy.evaluation.eval_result import EvalComparison

PAIRS = 36  # of the gallery
EXTREMES = 6  # pairs of the worst, and of the best
LOSSLESS_EDGE = 128  # pixels; images up to this size are embedded as PNG
EDGE = 384  # pixels; larger images are reduced to this size
QUALITY = 88
CLIP_BYTES = 300_000  # of an embedded clip, at most


@dataclass(frozen=True)
class ImagePair:
    """One held-out image before and after, as data URIs, with its score."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float
    width: int
    height: int
    inputs: tuple[str, ...] = ()  # the prompt's input images, the first with its mask tinted, if the model edits any
    clip_before: str = ""  # the clips as data URIs, whose posters are `before` and `after`; else empty
    clip_after: str = ""
    number: str = ""  # shown in place of the prompt in before_after.png, if its fonts lack the letters

    @property
    def change(self) -> float:
        return self.reward_after - self.reward_before


def gallery(comparison: EvalComparison, score: str) -> list[ImagePair]:
    """Return the first pairs in the order of the evaluation set, so that none is hand-picked, with one score."""
    shown = min(PAIRS, len(comparison.before))
    prompts = [prompt.text for prompt in comparison.chosen.prompts[:shown]]
    written = lettering(prompts).numbers
    return [replace(_pair(comparison, score, index), number=written[index]) for index in range(shown)]


def worst_and_best(comparison: EvalComparison, score: str) -> tuple[list[ImagePair], list[ImagePair]]:
    """Return the pairs with the lowest and the highest score after, the extreme first; no pair is in both."""
    values = comparison.scores_after[score]
    ranked = [int(index) for index in np.argsort(values, kind="stable") if np.isfinite(values[index])]
    shown = min(EXTREMES, len(ranked) // 2)
    lowest, highest = ranked[:shown], ranked[::-1][:shown]
    return [_pair(comparison, score, index) for index in lowest], [_pair(comparison, score, index) for index in highest]


def are_reduced(images: Pixels) -> bool:
    """Return whether the page shows the images reduced or with lossy compression, as it does with all clips."""
    return are_clips(images) or max(images.shape[1:3]) > LOSSLESS_EDGE


def data_uri(pixels: ImageOrClip) -> str:
    """Encode an image, or a clip's poster in the size of its file, as a data URI: PNG if it is small, else WebP."""
    shown = poster(playable(pixels, EDGE)) if is_clip(pixels) else pixels
    image, buffer = Image.fromarray(shown), io.BytesIO()
    if max(image.size) <= LOSSLESS_EDGE:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((EDGE, EDGE))
        image.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def clip_uri(pixels: ImageOrClip, frame_rate: float | None) -> str:
    """Encode a clip as the data URI of an mp4 file. Return an empty text for an image."""
    if frame_rate is None:
        return ""
    file = mp4(pixels, frame_rate, CLIP_BYTES, EDGE)
    return f"data:video/mp4;base64,{base64.b64encode(file).decode()}"


def _pair(comparison: EvalComparison, score: str, index: int) -> ImagePair:
    """Return one image before and after, with one score."""
    height, width = comparison.before[index].shape[-3:-1]
    return ImagePair(
        prompt=comparison.chosen.prompts[index].text,
        before=data_uri(comparison.before[index]),
        after=data_uri(comparison.after[index]),
        reward_before=float(comparison.scores_before[score][index]),
        reward_after=float(comparison.scores_after[score][index]),
        width=width,
        height=height,
        clip_before=clip_uri(comparison.before[index], comparison.frame_rate),
        clip_after=clip_uri(comparison.after[index], comparison.frame_rate),
        inputs=tuple(map(data_uri, shown_inputs(comparison, index))),
    )
