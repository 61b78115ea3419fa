"""Wire format between a reward service and its clients: JSON over HTTP, images as PNG in base64.

The client is `actors/rewards/http.py`, the server `deploy/reward_service.py`.
"""

import base64
import io
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ray_ddpo.common.run_storage.png import png

SCORE_PATH, HEALTH_PATH = "/v1/score", "/v1/health"


class Message(BaseModel):
    """A JSON object on the wire. Types are strict: a text is not converted to a number, and NaN is refused."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ScoreRequest(Message):
    """Images, or clips, of one size, each with its prompt and metadata."""

    images: list[str] = Field(min_length=1)  # PNG files in base64; the frames of a clip follow each other
    frames: int | None = Field(default=None, ge=1)  # of each clip; None: these are images
    prompts: list[str]
    metadata: list[dict[str, Any]]

    @model_validator(mode="after")
    def _one_of_each(self) -> "ScoreRequest":
        frames, images = self.frames or 1, len(self.images)
        if images != frames * len(self.prompts) or len(self.prompts) != len(self.metadata):
            what = f"{images} images" if self.frames is None else f"{images} images for clips of {frames} frames"
            prompts, metadata = len(self.prompts), len(self.metadata)
            raise ValueError(f"{what}, {prompts} prompts and {metadata} metadata: one of each is needed")
        return self


class ScoreReply(Message):
    """One number an image or a clip, in the request's order; null if an image could not be scored."""

    scores: list[float | None]


class Health(Message):
    """Reply to a health check, with the name of the served reward."""

    reward: str


class Fault(Message):
    """Reason for refusing a request."""

    error: str


def to_png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Encode an image losslessly as a PNG file in base64."""
    return base64.b64encode(png(image, compress_level=1)).decode("ascii")  # the default level takes five times as long


def from_png(text: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an untrusted image.

    Raises:
        ValueError: the text is not an RGB PNG in base64, or has more than `max_pixels`, which are then not decoded.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if image.mode != "RGB":
                raise ValueError(f"it is {image.mode}, and must be RGB")
            if image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} × {image.height} pixels, and there may be {max_pixels}")
            return np.array(image)
    # Pillow raises all of these for damaged files.
    except (OSError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no PNG that can be read: {type(error).__name__}: {error}") from None


def read_token(variable: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the bearer token in an environment variable; None if no variable is named.

    Raises:
        ValueError: the variable is not set, or holds characters that a token cannot have.
    """
    if variable is None:
        return None
    token = environment.get(variable, "")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the token is never shown, so the error is not more exact
        what = "has characters that no token has, such as a space or a line's end" if token else "is not set"
        raise ValueError(f"the environment variable {variable}, which token_variable names, {what} in this process")
    return token
