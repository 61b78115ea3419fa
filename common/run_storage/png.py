"""Images as PNG files in memory."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def from_png(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels of a PNG file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return the image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
