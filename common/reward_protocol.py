"""What a reward service and those who ask it say to each other: JSON over HTTP, images as PNG in base64."""

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

SCORE_PATH, HEALTH_PATH = "/v1/score", "/v1/health"


class Message(BaseModel):
    """A JSON object on the wire. Its types are taken as they come: a text is no number, a NaN none either."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ScoreRequest(Message):
    """PageImages of one size, and each one's prompt with its metadata."""

    images: list[str] = Field(min_length=1)  # PNG files in base64
    prompts: list[str]
    metadata: list[dict[str, Any]]

    @model_validator(mode="after")
    def _one_of_each(self) -> "ScoreRequest":
        counts = len(self.images), len(self.prompts), len(self.metadata)
        if len(set(counts)) > 1:
            raise ValueError(f"{counts[0]} images, {counts[1]} prompts and {counts[2]} metadata: one of each is needed")
        return self


class ScoreReply(Message):
    """One number an image, in the images' order; null where one could not be scored."""

    scores: list[float | None]


class Health(Message):
    """The service is there, and which reward it gives."""

    reward: str


class Fault(Message):
    """Why a request was not answered."""

    error: str


def to_png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """The image as a PNG file in base64; nothing is lost."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)  # the default level takes five times as long
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_png(text: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image that somebody sent. ValueError: it is no PNG of RGB, or has more pixels; then nothing is unpacked."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if image.mode != "RGB":
                raise ValueError(f"it is {image.mode}, and must be RGB")
            if image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width} × {image.height} pixels, and there may be {max_pixels}")
            return np.array(image)
    # What Pillow raises for files that are damaged, beside OSError.
    except (OSError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no PNG that can be read: {type(error).__name__}: {error}") from None


def read_token(variable: str | None, environment: Mapping[str, str]) -> str | None:
    """The bearer token in an environment variable, None where none is named. ValueError: it is not there, or no token."""
    if variable is None:
        return None
    token = environment.get(variable, "")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # never shown, so what is wrong with it is not said more exactly
        what = "has characters that no token has, such as a space or a line's end" if token else "is not set"
        raise ValueError(f"the environment variable {variable}, which token_variable names, {what} in this process")
    return token
