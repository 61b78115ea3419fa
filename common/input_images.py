"""Input images of prompts: the image that a prompt edits, and the mask of what may change; their files and contents.

A prompt's metadata names its files: `image` and `mask` with their paths, `image_sha256` and `mask_sha256` with their
contents. So ledger, resume, samplers and reward workers know them, and each reads the files where it runs.
"""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from ray_ddpo.common.preference_files import decoded_image, image_bytes
from ray_ddpo.common.preference_rows import fitted

IMAGE, MASK = "image", "mask"
CONTENT = "_sha256"
NAMES = (IMAGE, MASK)
MOST_CHECKED = 1000  # prompts whose images are decoded before a run starts
WHITE = 128  # of 255: a mask's pixels from here on may change
FITTED_KEPT = 64  # input images that a process keeps, fitted to the output's size
Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class InputImages:
    """Input images of B prompts, at the size of the images that are made of them."""

    pixels: UInt8[np.ndarray, "B H W 3"]
    masks: Bool[np.ndarray, "B H W"]  # true where the image may change; false everywhere if the prompt has no mask

    @property
    def contents(self) -> tuple[str, ...]:
        """Return one text per prompt, which is equal if its image and mask are."""
        rows = zip(self.pixels, self.masks, strict=True)
        return tuple(hashlib.sha256(pixels.tobytes() + mask.tobytes()).hexdigest() for pixels, mask in rows)

    def select(self, rows: Sequence[int]) -> "InputImages":
        """Return the input images of some of the prompts."""
        return InputImages(pixels=self.pixels[list(rows)], masks=self.masks[list(rows)])


def blank_inputs(count: int, size: tuple[int, int]) -> InputImages:
    """Return black images that may change everywhere, to try a model on. `size` is height and width in pixels."""
    return InputImages(pixels=np.zeros((count, *size, 3), np.uint8), masks=np.ones((count, *size), bool))


def read_inputs(metadata: Sequence[Metadata], size: tuple[int, int]) -> InputImages:
    """Read the input images that prompts' metadata names.

    Args:
        metadata: of each prompt.
        size: height and width in pixels. Images just cover it and are cut to their center, as `fitted` does.

    Raises:
        ValueError: a prompt has no input image, or its file is missing, damaged, or another one than at the start.
    """
    # Without its content a name is a column of the user's, with any value.
    files = [
        [(about[name], about[name + CONTENT]) if name + CONTENT in about else None for name in NAMES]
        for about in metadata
    ]
    rows = [_fitted_input(*pair, size) for pair in files]
    return InputImages(pixels=np.stack([row[0] for row in rows]), masks=np.stack([row[1] for row in rows]))


@functools.lru_cache(maxsize=FITTED_KEPT)
def _fitted_input(
    image: tuple[str, str] | None, mask: tuple[str, str] | None, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """Return the pixels and the mask of one prompt. Both are given by path and content."""
    if image is None:
        raise ValueError("a prompt has no input image, which this model edits: give its file as prompts.image_column")
    pixels = fitted(open_input("prompts.image_column", Path(image[0]), image[1]), size)
    if mask is None:
        return pixels, np.zeros(size, bool)
    return pixels, fitted(_as_mask(open_input("prompts.mask_column", Path(mask[0]), mask[1])), size)[..., 0] >= WHITE


def open_input(where: str, path: Path, sha256: str | None = None) -> Image.Image:
    """Decode an input image or mask, upright as its EXIF orientation says.

    Raises:
        ValueError: the file is missing, damaged, too large, has more than 8 bits a channel or transparent pixels, or
            its content is not `sha256`. The line begins with `where`.
    """
    where, data = f"{where}: the image {str(path)!r}", image_bytes(path, where, str(path))
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{where} is another file than when the run began: restore it, or begin a new run")
    return decoded_image(where, data)


def _as_mask(image: Image.Image) -> Image.Image:
    return image.convert("L").point([0] * WHITE + [255] * (256 - WHITE))


def with_inputs(metadata: dict[str, Any], columns: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Return a row's metadata with its image files under `image` and `mask`, as absolute paths, and their contents.

    Args:
        metadata: of the row, with the columns.
        columns: the column of `image` and, if there is one, that of `mask`.
        folder: where relative paths begin.

    Raises:
        ValueError: a column is missing or no path, there is no such file, or another column has a name of the result.
    """
    others, read = {name: value for name, value in metadata.items() if name not in columns.values()}, {}
    for name, column in columns.items():
        value = metadata.get(column)
        if not isinstance(value, str) or not value.strip():
            shown = f"is {str(value)[:40]!r}" if column in metadata else "is missing"
            raise ValueError(f"its {column!r} {shown}, and it must be the path of an image file")
        if "://" in value:
            raise ValueError(f"{column!r} is {value[:200]!r}: images are read from files, so download it first")
        path = (folder / os.path.expanduser(value)).absolute()
        if not _is_file(path):
            raise ValueError(f"{column!r}: there is no image {str(path)!r}")
        read |= {name: str(path), name + CONTENT: file_content(path)}
    if taken := sorted({*read, *(name + CONTENT for name in NAMES)} & set(others)):
        raise ValueError(
            f"its column {taken[0]!r} is none of {list(columns.values())}, and metadata of input images has that name: "
            "rename the column"
        )
    return others | read


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long
        return False


def file_content(path: Path) -> str:
    """Return the SHA-256 of a file. A file that has not changed is read once."""
    state = path.stat()
    return _content(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 20)
def _content(path: Path, size: int, changed: int) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"the image {str(path)!r} cannot be read: {error.strerror}") from error


def check_inputs(metadata: Sequence[Metadata], where: str) -> None:
    """Decode the images and masks of the first prompts. Raise ValueError if one cannot be used."""
    for about in metadata[:MOST_CHECKED]:
        names = [name for name in NAMES if name + CONTENT in about]
        images = {name: open_input(where, Path(about[name]), about[name + CONTENT]) for name in names}
        sizes = {name: image.size for name, image in images.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"{where}: the image {about[IMAGE]!r} has {sizes[IMAGE]} pixels, and its mask {about[MASK]!r} "
                f"{sizes[MASK]}: both must have one size"
            )
        brightest = int(np.asarray(images[MASK].convert("L")).max()) if MASK in images else 0
        if 0 < brightest < WHITE:
            raise ValueError(
                f"{where}: the brightest pixel of the mask {about[MASK]!r} is {brightest} of 255, and at least {WHITE} "
                "says where the image may change: save the mask with 0 and 255"
            )


def without_places(metadata: Metadata) -> dict[str, Any]:
    """Return metadata without the paths of input images, whose contents tell which they are wherever they lie."""
    return {name: value for name, value in metadata.items() if name + CONTENT not in metadata}


def content_key(text: str, metadata: Metadata) -> str:
    """Return what tells a prompt from others: its text and, if it has an input image, the image's content."""
    contents = [str(metadata[name + CONTENT]) for name in NAMES if name + CONTENT in metadata]
    return " ".join([text, *(f"[{content[:12]}]" for content in contents)])
