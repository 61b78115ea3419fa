"""The wire format: images arrive bit for bit, and impostors are not decompressed."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ray_ddpo.common.reward_protocol import ScoreReply, ScoreRequest, from_png, read_token, to_png


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (64, 48), (513, 2)])
def test_an_image_arrives_bit_for_bit(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image.flags.writeable = False  # as it comes out of Ray's store
    assert np.array_equal(from_png(to_png(image), size[0] * size[1]), image)


def file_of(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


RED = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"no image", "no PNG that can be read"),
        (b"", "no PNG that can be read"),
        (file_of(RED, "JPEG"), "no PNG that can be read"),
        (file_of(RED, "PNG")[:-30], "no PNG that can be read"),
        (file_of(RED, "PNG").replace(b"IDAT", b"IDOT"), "no PNG that can be read"),
        (file_of(RED.convert("RGBA"), "PNG"), "it is RGBA, and must be RGB"),
        (file_of(RED.convert("L"), "PNG"), "it is L, and must be RGB"),
        (file_of(RED.convert("P"), "PNG"), "it is P, and must be RGB"),
        (png_that_says(9, 8), "it has 9 × 8 pixels, and there may be 64"),
        (png_that_says(30_000, 30_000), "no PNG that can be read: DecompressionBombError"),
    ],
)
def test_an_image_of_the_wrong_kind_is_refused(file: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_png(base64.b64encode(file).decode(), 64)


@pytest.mark.parametrize("text", ["***", "abc", "é", "iVBORw0KGgo\n="])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_png(text, 64)


def test_an_image_of_exactly_the_allowed_pixels_is_accepted() -> None:
    assert from_png(base64.b64encode(file_of(RED, "PNG")).decode(), 64).shape == (8, 8, 3)


def test_a_request_has_as_many_prompts_and_metadata_as_images() -> None:
    for images, prompts, metadata in ((1, 2, 1), (1, 1, 0), (0, 0, 0)):
        with pytest.raises(ValidationError):
            ScoreRequest(images=[""] * images, prompts=["cat"] * prompts, metadata=[{}] * metadata)


def test_a_reply_takes_numbers_and_null_and_nothing_that_could_be_made_a_number() -> None:
    assert ScoreReply.model_validate_json('{"scores": [1, 2.5, null, -3e-5], "more": 1}').scores == [
        1,
        2.5,
        None,
        -3e-5,
    ]
    for value in ('"1"', "true", "NaN", "Infinity", "-Infinity", "[1]", "{}"):
        with pytest.raises(ValidationError):
            ScoreReply.model_validate_json(f'{{"scores": [{value}]}}')


def test_a_token_is_read_only_where_a_variable_is_named() -> None:
    assert read_token(None, {"REWARD_TOKEN": "abc"}) is None
    assert read_token("REWARD_TOKEN", {"REWARD_TOKEN": "abc"}) == "abc"
