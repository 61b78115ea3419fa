"""A file of prompts with input images and masks, as an editing run reads it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PROMPTS = ("make it red", "a cat", "make it red", "a dog")  # one text has two images


def input_pixels(number: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return an image that differs from those of other numbers. `size` is height and width."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def input_mask(number: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return a mask, true where the image may change: another half for each of four numbers."""
    rows, columns = np.indices(size)
    half = (rows < size[0] // 2, columns < size[1] // 2)[number % 2]
    return half if number % 4 < 2 else ~half


def save_inputs(folder: Path, prompts: Sequence[str] = PROMPTS, size: tuple[int, int] = (16, 16)) -> Path:
    """Write prompts.jsonl with an image and a mask for each prompt, beside it. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prompt in enumerate(prompts):
        Image.fromarray(input_pixels(number, size)).save(folder / f"{number}.png")
        Image.fromarray(input_mask(number, size).astype(np.uint8) * 255).save(folder / f"{number}_mask.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{number}.png", "mask": f"{number}_mask.png"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def input_table(file: Path, mask: bool = False) -> dict:
    """Return the recipe's `[prompts]` for such a file."""
    table = {"name": "file", "path": str(file), "image_column": "image", "column": "prompt"}
    return table | ({"mask_column": "mask"} if mask else {})


def save_several(folder: Path) -> Path:
    """Write prompts.jsonl with one, two and three images a prompt, of different sizes. Return its path."""
    save_inputs(folder)
    sizes = [(16, 16), (24, 16), (16, 40)]
    for number, size in enumerate(sizes):
        Image.fromarray(input_pixels(10 + number, size)).save(folder / f"more_{number}.png")
    lists = (["0.png"], ["1.png", "more_1.png"], ["2.png", "more_2.png", "more_0.png"], "3.png")
    rows = [{"prompt": prompt, "image": images} for prompt, images in zip(PROMPTS, lists, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "prompts.jsonl"
