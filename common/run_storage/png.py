"""An image as the bytes of a PNG file, and back."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def from_png(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels again."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
