"""Rewards that go wrong as a user's might: once, for one kind of picture, or for ever. Prompts tell them when."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.rewards.jpeg import jpeg_kilobytes

Metadata = list[dict[str, Any]]


def _first_time(prompts: list[str]) -> bool:
    """Whether a prompt is the path of a file that is not there yet; then it is, so that the next attempt goes well."""
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


def raises_for_bad(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    if "bad" in prompts:
        raise KeyError("bad")
    return [1.0 for _ in prompts]


def not_finite_for_bad(images: np.ndarray, prompts: list[str], metadata: Metadata) -> list[float]:
    return [float("nan") if prompt == "bad" else 1.0 for prompt in prompts]
