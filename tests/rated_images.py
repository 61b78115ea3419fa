"""Images that differ in colour and pattern, with a rating that is a known function of their pixels."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def warmth(pixels: np.ndarray) -> float:
    """Return how much redder than blue an image is on average: -1 … 1."""
    return float((pixels[..., 0].astype(float) - pixels[..., 2]).mean() / 255)


def warmth_rating(pixels: np.ndarray) -> float:
    """Return a rating from 1 to 10; grey has 5.5."""
    return 5.5 + 4.5 * warmth(pixels)


def save_images(folder: Path, count: int, seed: int = 0) -> dict[str, float]:
    """Write PNGs of several sizes, patterned in two colours. Return their ratings by path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, ratings = np.random.default_rng(seed), {}
    for number in range(count):
        height, width = generator.integers(24, 56, 2)
        y, x = np.mgrid[:height, :width]
        pattern = np.sin(x / generator.uniform(2, 9) + y / generator.uniform(2, 9))[..., None] / 2 + 0.5
        one, other = generator.uniform(0, 255, (2, 3))
        pixels = (pattern * one + (1 - pattern) * other + generator.normal(0, 6, (height, width, 3))).clip(0, 255)
        name = f"{seed}-{number:04d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        ratings[name] = warmth_rating(pixels.astype(np.uint8))
    return ratings


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    """Write a table with a header."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def write_ratings(path: Path, ratings: dict[str, float]) -> Path:
    """Write the table that goes with `save_images`."""
    return write_csv(path, {"path": list(ratings), "rating": list(ratings.values())})
