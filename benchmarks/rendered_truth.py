"""Draw images whose contents are known, words and coloured shapes, clean and degraded, to measure what reads them."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = ("DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")  # come with matplotlib, under their own free licence
DARK = ((0, 0, 0), (20, 40, 120), (120, 20, 20), (20, 90, 30))
LIGHT = ((255, 255, 255), (245, 235, 200), (210, 230, 250), (255, 220, 120))
RGB = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 30),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 40, 160),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
GROUNDS = ((190, 190, 190), (225, 225, 225), (150, 150, 150))
MARGIN = 0.08  # of the side, on each side of a word

Placed = tuple[str, str, float, float, float]  # shape, colour, centre x and y, and diameter, in shares of the side


def word_image(text: str, side: int, generator: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """Draw a text on one line across a square sign, in a random font and random colours, near the middle."""
    font_name = FONTS[generator.integers(len(FONTS))]
    dark, light = DARK[generator.integers(len(DARK))], LIGHT[generator.integers(len(LIGHT))]
    ink, ground = (dark, light) if generator.random() < 0.7 else (light, dark)
    drawn = 512  # drawn large and then reduced, so that every size shows the same sign
    image = Image.new("RGB", (drawn, drawn), ground)
    size = int(min(0.6 * drawn, _font(font_name, 100).size * drawn * (1 - 2 * MARGIN) / _width(font_name, text)))
    place = (drawn * 0.5, drawn * generator.uniform(0.35, 0.65))
    ImageDraw.Draw(image).text(place, text, fill=ink, font=_font(font_name, size), anchor="mm")
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def _width(name: str, text: str) -> float:
    left, _, right, _ = _font(name, 100).getbbox(text)
    return right - left


def shapes_image(
    placed: list[Placed], side: int, ground: tuple[int, int, int] = GROUNDS[0]
) -> UInt8[np.ndarray, "S S 3"]:
    """Draw coloured shapes on a plain ground, with smooth edges."""
    drawn = 4 * side
    image = Image.new("RGB", (drawn, drawn), ground)
    draw = ImageDraw.Draw(image)
    for shape, colour, x, y, diameter in placed:
        centre, radius = (x * drawn, y * drawn), diameter * drawn / 2
        if shape == "circle":
            draw.circle(centre, radius, fill=RGB[colour])
        else:
            corners = {"square": 4, "triangle": 3}[shape]
            reach = radius * math.sqrt(2) if shape == "square" else radius * 1.15
            draw.regular_polygon((*centre, reach), corners, fill=RGB[colour])
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def random_shapes(count: int, generator: np.random.Generator) -> list[Placed]:
    """Choose shapes, colours and places that do not touch each other. The diameter is 0.16 to 0.26 of the side."""
    placed: list[Placed] = []
    while len(placed) < count:
        diameter = generator.uniform(0.16, 0.26)
        x, y = generator.uniform(diameter / 2 + 0.06, 1 - diameter / 2 - 0.06, 2)
        if all(math.hypot(x - other[2], y - other[3]) > 0.72 * (diameter + other[4]) for other in placed):
            shape, colour = SHAPES[generator.integers(len(SHAPES))], list(RGB)[generator.integers(len(RGB))]
            placed.append((shape, colour, float(x), float(y), float(diameter)))
    return placed


def _blurred(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(image.width / 100))


def _noisy(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    noise = generator.normal(0, 25, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file)


def _faint(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image).astype(float)
    return Image.fromarray((pixels.mean((0, 1)) + 0.4 * (pixels - pixels.mean((0, 1)))).clip(0, 255).astype(np.uint8))


def _rotated(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    ground = tuple(int(level) for level in np.asarray(image)[0, 0])
    return image.rotate(generator.choice([-8, 8]), Image.Resampling.BICUBIC, fillcolor=ground)


DEGRADATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "clean": lambda image, generator: image,
    "blurred": _blurred,  # Gaussian, standard deviation of 1 % of the side
    "noisy": _noisy,  # Gaussian, standard deviation of 25 grey levels
    "jpeg": _jpeg,  # quality 20
    "faint": _faint,  # 40 % of the contrast
    "rotated": _rotated,  # by 8 degrees
}


def degraded(
    image: UInt8[np.ndarray, "S S 3"], kind: str, generator: np.random.Generator
) -> UInt8[np.ndarray, "S S 3"]:
    """Degrade an image in one of the ways of `DEGRADATIONS`."""
    return np.asarray(DEGRADATIONS[kind](Image.fromarray(image), generator).convert("RGB"))
