"""Clips for tests: moving squares, and a small recipe of a family of video."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_families import policy_table
from tests.tiny_video import FRAMES, save_tiny_wan


def moving_clip(number: int = 0, frames: int = FRAMES, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Return a red square on a dark ground that moves by 2 pixels a frame. `size` is height and width."""
    clip = np.full((frames, *size, 3), 20 + 10 * number, np.uint8)
    for frame in range(frames):
        clip[frame, 4:12, 2 * frame : 2 * frame + 8] = (220, 30, 40)
    return clip


def video_tables(tables: dict, folder: Path, **others: Any) -> dict:
    """Return a small recipe of Wan on the reward of motion, with its model."""
    model = folder / "wan"
    if not model.exists():
        save_tiny_wan(model)
    return {
        **tables,
        "policy": policy_table("wan", model),
        "prompts": {**tables["prompts"], "images_per_prompt": 2},
        "sampling": {**tables["sampling"], "eta": 0.7},
        "reward": {"name": "motion"},
        "algorithm": {"name": "grpo"},
        "learner": {**tables["learner"], "micro_batch_size": 4},
        "evaluation": {"every": 1, "images": 4, "batch_size": 4},
        "checkpoint": {"every": 1, "keep": 3},
        **others,
    }
