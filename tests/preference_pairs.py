"""Preference files with noise images, and recipes that train on them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ray_ddpo.common.preference_files import Preference, write_preferences

PROMPTS = ("cat", "dog", "horse", "ant", "bee")
SIZE = (24, 20)  # height and width of the images


def png_of_noise(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """Return a PNG file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_pairs(path: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Write one pair for each prompt, with other images in each."""
    write_preferences(
        path,
        [
            Preference(prompt=prompt, chosen=png_of_noise(2 * row), rejected=png_of_noise(2 * row + 1))
            for row, prompt in enumerate(prompts)
        ],
    )
    return path


def offline_tables(tables: dict, pairs: Path, algorithm: str = "dpo") -> dict:
    """Return a small recipe that trains on a preference file."""
    keys = {"beta": 100.0} if algorithm == "dpo" else {}
    return {
        **tables,
        "prompts": {"name": "preferences", "path": str(pairs), "images_per_prompt": 2},
        "sampling": {**tables["sampling"], "deterministic": True, "guidance_scale": 1.0},
        "reward": {"name": "preference"},
        "algorithm": {"name": algorithm, **keys},
        "learner": {**tables["learner"], "micro_batch_size": 2 if algorithm == "sft" else 4},
    }
