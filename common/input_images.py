"""Input images of prompts: the image that a prompt edits, and the mask of what may change; their files and contents.

A prompt's metadata names its files: `image` and `mask` with their paths, `image_sha256` and `mask_sha256` with their
contents. Several images are lists. So ledger, resume, samplers and reward workers know them, and each reads the files
where it runs.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
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

    pixels: UInt8[np.ndarray, "B H W 3"]  # each prompt's first image
    masks: Bool[np.ndarray, "B H W"]  # true where that image may change; false everywhere if the prompt has no mask
    further: tuple[UInt8[np.ndarray, "_ H W 3"], ...] = ()  # each prompt's other images; empty if no prompt has any

    @property
    def images(self) -> tuple[UInt8[np.ndarray, "_ H W 3"], ...]:
        """Return all images of each prompt, in the order of its list."""
        others = self.further or [pixels[:0] for pixels in self.pixels[:, None]]
        return tuple(np.concatenate(both) for both in zip(self.pixels[:, None], others, strict=True))

    @property
    def contents(self) -> tuple[str, ...]:
        """Return one text per prompt, which is equal if its images and mask are."""
        rows = zip(self.images, self.masks, strict=True)
        return tuple(hashlib.sha256(images.tobytes() + mask.tobytes()).hexdigest() for images, mask in rows)

    def select(self, rows: Sequence[int]) -> "InputImages":
        """Return the input images of some of the prompts."""
        further = tuple(self.further[row] for row in rows) if self.further else ()
        return InputImages(pixels=self.pixels[list(rows)], masks=self.masks[list(rows)], further=further)


def blank_inputs(count: int, size: tuple[int, int], images: int = 1) -> InputImages:
    """Return black images that may change everywhere, to try a model on.

    Args:
        count: of the prompts.
        size: height and width in pixels.
        images: of each prompt.
    """
    pixels, further = np.zeros((count, *size, 3), np.uint8), np.zeros((images - 1, *size, 3), np.uint8)
    return InputImages(pixels=pixels, masks=np.ones((count, *size), bool), further=(further,) * count * (images > 1))


def read_inputs(metadata: Sequence[Metadata], size: tuple[int, int]) -> InputImages:
    """Read the input images that prompts' metadata names.

    Args:
        metadata: of each prompt.
        size: height and width in pixels. Images just cover it and are cut to their center, as `fitted` does.

    Raises:
        ValueError: a prompt has no input image, or its file is missing, damaged, or another one than at the start.
    """
    files = [[files_of(about, name) for name in NAMES] for about in metadata]
    if not all(images for images, _ in files):
        raise ValueError("a prompt has no input image, which this model edits: give its file as prompts.image_column")
    rows = [[_fitted_input(*image, size) for image in images] for images, _ in files]
    masks = [_fitted_mask(*mask[0], size) if mask else np.zeros(size, bool) for _, mask in files]
    further = tuple(np.array(row[1:], np.uint8).reshape(-1, *size, 3) for row in rows)
    several = any(map(len, further))
    return InputImages(
        pixels=np.stack([row[0] for row in rows]), masks=np.stack(masks), further=further if several else ()
    )


def files_of(metadata: Metadata, name: str) -> list[tuple[str, str]]:
    """Return path and content of each file that metadata has under `image` or `mask`; empty if there is none."""
    if name + CONTENT not in metadata:  # then the name is a column of the user's, with any value
        return []
    return list(zip(_listed(metadata[name]), _listed(metadata[name + CONTENT]), strict=True))


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


@functools.lru_cache(maxsize=FITTED_KEPT)
def _fitted_input(path: str, content: str, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    return fitted(open_input("prompts.image_column", Path(path), content), size)


@functools.lru_cache(maxsize=FITTED_KEPT)
def _fitted_mask(path: str, content: str, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    return fitted(_as_mask(open_input("prompts.mask_column", Path(path), content)), size)[..., 0] >= WHITE


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
        metadata: of the row, with the columns. That of `image` may have a list of paths.
        columns: the column of `image` and, if there is one, that of `mask`.
        folder: where relative paths begin.

    Raises:
        ValueError: a column is missing or no path, there is no such file, or another column has a name of the result.
    """
    others, read = {name: value for name, value in metadata.items() if name not in columns.values()}, {}
    for name, column in columns.items():
        paths = list(_paths(metadata, column, folder, name == IMAGE))
        found = {name: [str(path) for path in paths], name + CONTENT: [file_content(path) for path in paths]}
        read |= found if len(paths) > 1 else {key: value[0] for key, value in found.items()}
    if taken := sorted({*read, *(name + CONTENT for name in NAMES)} & set(others)):
        raise ValueError(
            f"its column {taken[0]!r} is none of {list(columns.values())}, and metadata of input images has that name: "
            "rename the column"
        )
    return others | read


def _paths(metadata: Metadata, column: str, folder: Path, several: bool) -> Iterator[Path]:
    """Yield the image files that a row names in a column: one, or `several` in a list."""
    value = metadata.get(column)
    for each in value if several and isinstance(value, list) and value else [value]:
        if not isinstance(each, str) or not each.strip():
            shown = f"is {str(value)[:40]!r}" if column in metadata else "is missing"
            raise ValueError(f"its {column!r} {shown}, and it must be the path of an image file")
        if "://" in each:
            raise ValueError(f"{column!r} is {each[:200]!r}: images are read from files, so download it first")
        path = (folder / os.path.expanduser(each)).absolute()
        if not _is_file(path):
            raise ValueError(f"{column!r}: there is no image {str(path)!r}")
        yield path


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
        read = [[open_input(where, Path(path), content) for path, content in files_of(about, name)] for name in NAMES]
        images = {name: each[0] for name, each in zip(NAMES, read, strict=True) if each}  # a mask is of the first image
        sizes = {name: image.size for name, image in images.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"{where}: the image {_listed(about[IMAGE])[0]!r} has {sizes[IMAGE]} pixels, and its mask "
                f"{about[MASK]!r} {sizes[MASK]}: both must have one size"
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
    """Return what tells a prompt from others: its text and, if it has input images, their contents."""
    contents = [
        str(content) for name in NAMES if name + CONTENT in metadata for content in _listed(metadata[name + CONTENT])
    ]
    return " ".join([text, *(f"[{content[:12]}]" for content in contents)])
