"""A small copy of a report's image, for a page of the documentation."""

from pathlib import Path

from PIL import Image


def small_copy(source: Path, path: Path, width: int) -> None:
    """Write an image with at most 256 colors and `width` pixels a row."""
    image = Image.open(source).convert("RGB")
    height = round(image.height * width / image.width)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    palette = small.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    # Without dithering the soft colors of blurred images turn into bands.
    small.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
