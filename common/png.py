"""A picture as the bytes of a PNG file."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
