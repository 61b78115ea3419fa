"""Functions as a user would write them, for components that take `module:function`."""

from typing import Any

import numpy as np


def brightness(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(image.mean()) for image in images]


def one_number_for_all(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> float:
    return 1.0


def prompts_and_metadata(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[int]:
    return [len(prompt) + entry["bonus"] for prompt, entry in zip(prompts, metadata, strict=True)]


def colour_prompt(generator: np.random.Generator) -> tuple[str, dict[str, Any]]:
    colour = ["red", "green", "blue"][generator.integers(3)]
    return f"a {colour} cat", {"colour": colour}


def text_prompt(generator: np.random.Generator) -> str:
    return f"cat number {generator.integers(1000)}"


def no_prompt(generator: np.random.Generator) -> int:
    return 7


NOT_A_FUNCTION = 3


def nothing_returned(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
    images.mean()


def two_parameters(images: np.ndarray, prompts: list[str]) -> list[float]:
    return [1.0] * len(images)


async def not_awaited(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [1.0] * len(images)


def yields(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    yield from (1.0 for _ in images)


class Scorer:
    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return images.mean(axis=(1, 2, 3))


scorer = Scorer()


def redness_of_tensors(images, prompts, metadata):
    """Return the mean of the red channel of tensors [B, 3, H, W], and metadata, as TRL's functions do."""
    return images[:, 0].mean(dim=(1, 2)), {}


def seldom(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Return 1 for about every fourth image, else 0: most groups of two have equal rewards."""
    return (images.reshape(len(images), -1).astype(int).sum(axis=1) % 4 == 0).astype(np.float32)


def never(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    return np.zeros(len(images), np.float32)


def of_clips(clips: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(clip[-1].mean()) for clip in clips]


def likeness_to_all(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]], inputs: Any) -> list[float]:
    """Return the number of input images, plus a likeness below 1 to their mean."""
    means = [each.mean(axis=0) for each in inputs.images]
    likeness = [1 - np.abs(image - mean).mean() / 256 for image, mean in zip(images, means, strict=True)]
    return [len(each) + 0.5 * like for each, like in zip(inputs.images, likeness, strict=True)]
