"""Random access to the pairs of a preference file, and their images at the size that a policy trains on."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ray_ddpo.common.preference_files import (
    COLUMNS,
    check_columns,
    check_there,
    checked_prompt,
    decoded_image,
    first_line,
    image_bytes,
    json_row,
    no_rows,
    parquet_column,
    parquet_columns,
)
from ray_ddpo.common.reading import DAMAGED

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")


class PreferenceRows:
    """The rows of a preference file. Prompts are in memory, and an image is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read and check the prompts of all rows.

        Raises:
            ValueError: the file cannot be used. One line names the file, the row and the column.
        """
        check_there(path)
        self._path = path
        self._read = self._index_parquet() if path.suffix == ".parquet" else self._index_json()
        if not self.prompts:
            raise no_rows(path)

    def _index_parquet(self) -> Any:
        """Read the prompts, and return the function that reads an image's cell."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        names = parquet_columns(self._path)
        if missing := [name for name in COLUMNS if name not in names]:
            raise ValueError(
                f"{self._path} has the columns {names} and no {missing[0]!r}; a row has {', '.join(COLUMNS)}"
            )
        self.prompts: list[str] = []
        for number, (name, value) in enumerate(parquet_column(self._path, "prompt"), 1):
            where = f"{self._path}, row {number}"
            check_columns(where, {name: value, **dict.fromkeys(SIDES, "not read yet")})
            self.prompts.append(checked_prompt(where, value))
        file = parquet.ParquetFile(self._path)
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])

        @functools.lru_cache(maxsize=2)  # a pair's two images are read one after the other
        def group(number: int) -> pa.Table:
            try:
                return file.read_row_group(number, columns=list(SIDES))
            except (*DAMAGED, OSError, pa.ArrowException) as error:
                rows = f"rows {starts[number] + 1} to {starts[number + 1]}"
                raise ValueError(
                    f"{self._path}, {rows}, chosen and rejected: the columns are damaged, write the file again: "
                    f"{first_line(error)}"
                ) from error

        def read(row: int, side: Side) -> Any:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            return group(number)[side][row - int(starts[number])].as_py()

        return read

    def _index_json(self) -> Any:
        """Read the prompts and the place of each line, and return the function that reads an image's cell."""
        self.prompts, places, place = [], [], 0
        for number, line in enumerate(self._lines(), 1):
            where = f"{self._path}, row {number}"
            row = json_row(where, line)
            check_columns(where, row)
            self.prompts.append(checked_prompt(where, row["prompt"]))
            places.append(place)
            place += len(line)

        def read(row: int, side: Side) -> Any:
            with self._path.open("rb") as lines:
                lines.seek(places[row])
                return json_row(f"{self._path}, row {row + 1}", lines.readline()).get(side)

        return read

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as lines:
            yield from lines

    def image(self, row: int, side: Side) -> Image.Image:
        """Decode an image.

        Args:
            row: the pair, from 0.

        Raises:
            ValueError: it is missing or damaged. One line names the file, the row (from 1) and the column.
        """
        where = f"{self._path}, row {row + 1}"
        value = self._read(row, side)
        check_columns(where, {**dict.fromkeys(COLUMNS, "read before"), side: value})
        return decoded_image(f"{where}, {side}", image_bytes(self._path, f"{where}, {side}", value))

    def check_images(self, most: int) -> None:
        """Decode both images of the first `most` pairs. Raise ValueError if one is missing or damaged."""
        for row in range(min(most, len(self.prompts))):
            for side in SIDES:
                self.image(row, side)


def preference_rows(path: Path) -> PreferenceRows:
    """Return a preference file's rows. A file that has not changed is indexed once.

    Raises:
        ValueError: the file cannot be used.
    """
    check_there(path)
    state = path.stat()
    return _indexed(path.absolute(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _indexed(path: Path, size: int, changed: int) -> PreferenceRows:
    return PreferenceRows(path)


def fitted(image: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Resize an image so that it just covers `size`, and cut out the center, as the authors of Diffusion-DPO do.

    An image of that size keeps its pixels. Resizing is bilinear with antialiasing (DiffusionDPO's `train.py`:
    torchvision's `Resize` and `CenterCrop`, whose rounding this function has).

    Args:
        size: height and width in pixels.
    """
    image, (height, width) = image.convert("RGB"), size
    if image.width * height >= image.height * width:
        covering = image.width * height // image.height, height
    else:
        covering = width, image.height * width // image.width
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))
