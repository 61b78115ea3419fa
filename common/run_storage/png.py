"""Images as PNG files in memory."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def from_png(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels of a PNG file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png(pixels: UInt8[np.ndarray, "H W 3"], compress_level: int = -1) -> bytes:
    """Return the image as a PNG file. Pillow's own level of compression is -1."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()
