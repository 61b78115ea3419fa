"""python -m benchmarks.recognition: how often text and shapes are read right in rendered images, by size and damage."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.rendered_truth import DEGRADATIONS, GROUNDS, degraded, random_shapes, shapes_image, word_image
from benchmarks.timing import machine
from ray_ddpo.actors.detection.shapes import ShapeDetector
from ray_ddpo.actors.rewards.ocr import Ocr, load_readers, normalized

WORDS = [
    "CAT",
    "DOG",
    "OPEN",
    "STOP",
    "EXIT",
    "CAFE",
    "HELLO",
    "WORLD",
    "PIZZA",
    "SALE",
    "Music",
    "Garden",
    "School",
    "Bakery",
    "coffee",
    "2024",
    "HAPPY",
    "Winter",
    "Summer",
    "Fresh",
] + ["Hello World", "Grand Opening", "New York", "Happy New Year"]
SIDES = (64, 128, 256, 512)
IMAGES = 40  # of shapes, in each cell


def text_case(side: int, kind: str) -> Iterator[tuple[np.ndarray, str]]:
    """Yield an image for each text, with the text that should be read."""
    generator = np.random.default_rng(0)
    for text in WORDS:
        yield degraded(word_image(text, side, generator), kind, generator), normalized(text)


def shapes_case(side: int, kind: str) -> Iterator[tuple[np.ndarray, Counter]]:
    """Yield images of one to five shapes, with the number of each shape in each colour."""
    generator = np.random.default_rng(1)
    for place in range(IMAGES):
        placed = random_shapes(int(generator.integers(1, 6)), generator)
        image = degraded(shapes_image(placed, side, GROUNDS[place % len(GROUNDS)]), kind, generator)
        yield image, Counter((shape, colour) for shape, colour, *_ in placed)


def seen(image: np.ndarray) -> Counter:
    """Return the number of each shape in each colour that the detector sees."""
    detector = ShapeDetector("cpu")
    (found,) = detector.detect([image], [()])
    return Counter((name, colour) for name in found for colour in detector.colours(image, found[name], name))


def measured(case: Iterator[tuple[np.ndarray, object]], read: Callable[[np.ndarray], object]) -> tuple[float, float]:
    """Return the share of images that are read right, and images a second."""
    right, spent = [], 0.0
    for image, truth in case:
        start = time.perf_counter()
        right.append(read(image) == truth)
        spent += time.perf_counter() - start
    return float(np.mean(right)), len(right) / spent


def main() -> None:
    """Print a table for text and one for shapes."""
    print(machine())
    settings = Ocr()
    reader = load_readers("cpu", settings.reading_side, settings.min_confidence)[0]
    kinds = {"text": (text_case, lambda image: normalized(reader(image))), "shapes": (shapes_case, seen)}
    for name, (case, read) in kinds.items():
        print(f"| {name}, side | {' | '.join(DEGRADATIONS)} | images a second |\n|{'---|' * (len(DEGRADATIONS) + 2)}")
        for side in SIDES:
            cells = [measured(case(side, kind), read) for kind in DEGRADATIONS]
            rate = np.mean([speed for _, speed in cells])
            print(f"| {side} | {' | '.join(f'{share:.2f}' for share, _ in cells)} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
