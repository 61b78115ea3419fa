"""Text rendering: read the image with a recognizer, and compare with the words in the prompt's quotes (Flow-GRPO)."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.prompts import Prompt

QUOTED = re.compile(r'"([^"]*)"')

WEIGHT_BYTES = 9_929_594 + 21_234_383  # of one recognizer: the files of PP-OCRv6's detection and recognition, small
MULTIPLE = 32  # pixels: the detection network takes sides that are multiples of it
LONGEST = 4  # times the shorter side: a longer image is padded, because the recognizer would enlarge it to a huge one
BICUBIC = Image.Resampling.BICUBIC

# Channels, height and least width of what the recognition network reads; a narrower line is padded.
DETECTED_LINE, SINGLE_LINE = [3, 48, 320], [3, 48, 96]
INK = 0.3  # of the strongest contrast with the ground, from which on a pixel is text
LINE_MARGIN = 0.2  # of the text's height, above and below it

Read = Callable[[UInt8[np.ndarray, "H W 3"]], str]


class Ocr(Reward):
    """Text that a recognizer (PP-OCRv6, small) reads in the image, compared with the first words in double quotes.

    Spaces and upper and lower case do not count, as in Flow-GRPO (Liu et al. 2025). An image is read by itself, so its
    score does not depend on the batch.
    """

    required_packages: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime", "rapidfuzz")

    measure: Literal["partial", "strict"] = "partial"
    """Share of the text that is right, 0 to 1, whatever else the image says (`partial`), or 1 if the image says this text
    and nothing else, else 0 (`strict`)."""
    reading_side: int = Field(default=128, ge=32, le=2000)
    """Side in pixels. An image whose shorter side has fewer is enlarged to it before text is looked for."""
    detect: bool = True
    """Look for lines of text. If false, an image is read as a single line on a plain ground, which is faster."""
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    """Confidence below which a line of text is ignored."""

    @property
    def memory_bytes(self) -> int:
        """The size of one recognizer's weights. On the CPU each further thread has a recognizer of its own."""
        return WEIGHT_BYTES

    @property
    def independent_of_batch(self) -> bool:
        return True

    @property
    def score_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        targets = {target(prompt.text): prompt.text for prompt in prompts}
        letters = {letter for words in targets for letter in words if letter.isalpha()}
        if all(letter.isascii() for letter in letters):
            return
        unknown = letters - readable_characters()
        for words, text in targets.items():
            if found := sorted(unknown & set(words)):
                raise ValueError(
                    f"prompt {text[:200]!r} has the letters {''.join(found)} in its quoted words, which the recognizer does "
                    "not know: it reads Latin, Greek, Chinese and Japanese"
                )

    def load(self, device: str) -> LoadedReward:
        """Load one recognizer a thread of the process (`runtime.threads`), or one on a GPU.

        The loaded reward raises ValueError if a prompt has no words in double quotes.
        """
        readers = load_readers(device, self.reading_side, self.min_confidence, self.detect)
        compare = right_share if self.measure == "partial" else is_same

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            targets = [target(prompt) for prompt in prompts]
            texts = read_all(readers, images)
            return np.array(
                [compare(text, wanted) for text, wanted in zip(texts, targets, strict=True)], dtype=np.float32
            )

        return score


def target(prompt: str) -> str:
    """Return the first words in double quotes without spaces and in lower case.

    Raises:
        ValueError: there are none, or a quote is not closed, so that it is not clear which words are quoted.
    """
    found = QUOTED.search(prompt)
    words = normalized(found[1]) if found else ""
    shown = repr(prompt if len(prompt) <= 200 else f"{prompt[:200]}…")
    if words and (count := prompt.count('"')) % 2:
        raise ValueError(
            f"prompt {shown} has {count} double quotes, so that it is not clear which words are quoted: write "
            "other signs for inches and the like"
        )
    if not words:
        raise ValueError(
            f"prompt {shown} has no words in double quotes: the reward ocr compares an image's text with the prompt's "
            """first quoted words, as in 'a sign that says "OPEN"'"""
        )
    return words


@cache
def readable_characters() -> frozenset[str]:
    """Return the characters that the recognizer can give, in lower case."""
    from rapidocr import RapidOCR

    recognizer: Any = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False})
    recognizer(np.zeros((48, 96, 3), np.uint8), use_det=False)  # it loads its network at the first image
    return frozenset(normalized("".join(recognizer.text_rec.session.get_character_list())))


def normalized(text: str) -> str:
    """Return a text in lower case and without white space. Full-width letters, which recognizers confuse, are plain."""
    return "".join(unicodedata.normalize("NFKC", text).split()).lower()


def right_share(text: str, wanted: str) -> float:
    """Return 1 - min(d, n) / n, with d the edit distance to the n letters of `wanted`; 1 if the text contains them.

    Flow-GRPO (Liu et al. 2025), `flow_grpo/ocr.py`. `wanted` is normalized.
    """
    from rapidfuzz.distance import Levenshtein

    text = normalized(text)
    distance = 0 if wanted in text else min(Levenshtein.distance(text, wanted), len(wanted))
    return 1 - distance / len(wanted)


def is_same(text: str, wanted: str) -> float:
    """Return 1 if the text is `wanted`, which is normalized, and nothing else; else 0."""
    return float(normalized(text) == wanted)


def load_readers(device: str, reading_side: int, min_confidence: float, detect: bool = True) -> list[Read]:
    """Load recognizers that may run at the same time, each on one thread of the CPU; or a single one on a GPU.

    A text's lines are joined from top to bottom. Without `detect`, an image is one line. One thread each, so that the
    number of threads changes no bit.
    """
    import onnxruntime
    from rapidocr import RapidOCR

    on_gpu = device.startswith("cuda")
    if on_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        print_line("note: the reward ocr reads on the CPU: the GPU needs the package onnxruntime-gpu")
        on_gpu = False
    engine = "EngineConfig.onnxruntime."
    settings = {
        "Global.log_level": "error",
        "Global.text_score": min_confidence,
        "Global.use_cls": False,  # the direction of a text: an image with its text upside down is no good image
        "Det.limit_side_len": MULTIPLE,  # images are enlarged here
        "Rec.rec_img_shape": DETECTED_LINE if detect else SINGLE_LINE,
        f"{engine}intra_op_num_threads": 1,
        f"{engine}inter_op_num_threads": 1,
        f"{engine}use_cuda": on_gpu,
        f"{engine}cuda_ep_cfg.device_id": torch.device(device).index or 0,
    }

    def load_reader() -> Read:
        recognizer: Any = RapidOCR(params=settings)

        def read(image: UInt8[np.ndarray, "H W 3"]) -> str:
            blue_first = np.ascontiguousarray(enlarged(image, reading_side)[..., ::-1])
            return "".join(recognizer(blue_first).txts or ())

        def read_line(image: UInt8[np.ndarray, "H W 3"]) -> str:
            blue_first = np.ascontiguousarray(without_margins(image)[..., ::-1])
            found = recognizer(blue_first, use_det=False)
            return "".join(
                text for text, score in zip(found.txts or (), found.scores, strict=False) if score >= min_confidence
            )

        return read if detect else read_line

    return [load_reader() for _ in range(1 if on_gpu else torch.get_num_threads())]


def enlarged(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Enlarge an image whose shorter side is below `side`. An elongated one is padded with its edges first."""
    height, width = image.shape[:2]
    shortest = -(-max(height, width) // LONGEST)
    above, left = max(0, shortest - height) // 2, max(0, shortest - width) // 2
    below, right = max(0, shortest - height) - above, max(0, shortest - width) - left
    image = np.pad(image, ((above, below), (left, right), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    factor = side / min(height, width)
    if factor <= 1:
        return image
    return np.asarray(Image.fromarray(image).resize((round(factor * width), round(factor * height)), BICUBIC))


def without_margins(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H2 W 3"]:
    """Cut the plain rows above and below the text, but for a margin. The ground is the median colour of the edges."""
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.abs(image - np.median(edges, axis=0)).max(axis=-1)
    rows = np.nonzero(contrast.max(axis=1) > INK * contrast.max())[0]
    if not len(rows):
        return image
    margin = max(1, round(LINE_MARGIN * (np.ptp(rows) + 1)))
    return image[max(0, rows[0] - margin) : rows[-1] + 1 + margin]


def read_all(readers: list[Read], images: Images) -> list[str]:
    """Read every image. Each recognizer takes an equal share, in a thread of its own."""

    def read_share(place: int) -> list[str]:
        return [readers[place](image) for image in images[place :: len(readers)]]

    with ThreadPoolExecutor(len(readers)) as pool:
        shares = list(pool.map(read_share, range(len(readers))))
    return [shares[image % len(readers)][image // len(readers)] for image in range(len(images))]
