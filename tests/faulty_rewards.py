"""Rewards that fail as a user's might: once, for one kind of image, or always. Prompts tell them when."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ray_ddpo.actors.rewards.jpeg import jpeg_kilobytes

Metadata = list[dict[str, Any]]


def _first_time(prompts: list[str]) -> bool:
    """Return True and create the file if a prompt is the path of a file that does not exist yet."""
    for prompt in prompts:
        if prompt.startswith("/") and not Path(prompt).exists():
            Path(prompt).touch()
            return True
    return False


def raises_once(images: np.ndarray, prompts: list[str], metadata: Metadata) -> np.ndarray:
    if _first_time(prompts):
        raise ConnectionError("the service is not up yet")
    return jpeg_kilobytes(images)


def hangs_once(images: np.ndarray, prompts: list[str], metadata: Metadata) -> np.ndarray:
    if _first_time(prompts):
        time.sleep(3600)
    return jpeg_kilobytes(images)


def fills_memory_once(images: np.ndarray, prompts: list[str], metadata: Metadata) -> np.ndarray:
    """Take 6 GB of memory, the first time, and keep it until Ray's memory monitor ends a process."""
    if _first_time(prompts):
        taken = [np.ones((1 << 27,), np.uint8) for _ in range(48)]
        time.sleep(30)
        del taken
    return jpeg_kilobytes(images)


def raises_for_bad(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    if "bad" in prompts:
        raise KeyError("bad")
    return [1.0 for _ in prompts]


def not_finite_for_bad(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    return [float("nan") if prompt == "bad" else 1.0 for prompt in prompts]


def raises_always(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    return [prompts[0].no_such_method() for _ in images]  # type: ignore[attr-defined]


def raises_from_the_second_round(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    _calls.append(1)
    if len(_calls) > 3:  # a round has two batches, and before the first it is tried once
        raise RuntimeError("the licence has expired")
    return [float(image.mean()) for image in images]


def raises_on_black(images: np.ndarray, prompts: list[str], metadata: Metadata) -> np.ndarray:
    if not images.any(axis=(1, 2, 3)).all():
        raise ValueError("a black image")
    return jpeg_kilobytes(images)


def writes_into_images(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    images[:] = 0
    return [1.0 for _ in images]


KILLER, UNDECODABLE = 859065, 498662  # numbers of two prompts of the first round, with the recipe's seed 0


def not_finite_for_the_same(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    numbers = [entry["number"] for entry in metadata]
    return [float("nan") if number in (KILLER, UNDECODABLE) else float(number) for number in numbers]


def dies_of_one(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    if any(entry["number"] == KILLER for entry in metadata):
        os.abort()
    return [float(entry["number"]) for entry in metadata]


def constant(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    return [0.1 for _ in images]


def numbered_prompt(generator: np.random.Generator) -> tuple[str, dict[str, Any]]:
    number = int(generator.integers(1_000_000))
    return f"cat number {number}", {"number": number}


_calls: list[int] = []


def collapses(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    _batches.append(1)
    return [place % 4 - (100.0 if len(_batches) > 5 else 0.0) for place in range(len(images))]


_batches: list[int] = []


def raises_for_one_prompt(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Raise at the image of one prompt."""
    if "cat" in prompts:
        raise RuntimeError("it is a cat")
    return images.mean(axis=(1, 2, 3))


def nan_for_one_prompt(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Divide 0 by 0 for one prompt."""
    return np.array([np.nan if prompt == "cat" else 1.0 + row for row, prompt in enumerate(prompts)])
