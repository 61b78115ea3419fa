"""Read image files of any size and mode for CLIP, resized and cropped to squares so that they stack into a batch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ray_ddpo.common.image_models.clip_preprocessing import grey_levels, rgb_pixels

LONGEST = 100  # the largest aspect ratio: beyond it an image resized for CLIP would fill the memory
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)  # the errors that Pillow raises for bad files
NOT_THERE = "it is not in the folder"


@dataclass(frozen=True)
class FileState:
    """Size and modification time, by which a changed file is recognized; -1 and 0 if there is no file."""

    size: int  # bytes
    modified: int  # nanoseconds since 1970

    @property
    def there(self) -> bool:
        return self.size >= 0


def file_state(path: Path) -> FileState:
    """Return a file's state without opening the file."""
    if not path.is_file():
        return FileState(-1, 0)
    found = path.stat()
    return FileState(found.st_size, found.st_mtime_ns)


def squared(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Resize and crop as CLIP's preprocessing does, which then changes nothing."""
    levels = grey_levels(torch.from_numpy(pixels)[None], side)[0]
    return levels.permute(1, 2, 0).to(torch.uint8).numpy()


def read_squared(path: Path, side: int) -> UInt8[np.ndarray, "{side} {side} 3"] | str:
    """Return an image for CLIP, or the reason why there is none."""
    try:
        with Image.open(path) as image:
            if max(image.size) > LONGEST * min(image.size):
                return f"it is {image.width} x {image.height}: the longer side may be {LONGEST} times the shorter one"
            return squared(rgb_pixels(image), side)
    except FileNotFoundError:
        return NOT_THERE
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}".replace(str(path), path.name)
