"""Preference files: pairs of a chosen and a rejected image of one prompt, as parquet or JSON lines."""

import io
import json
import math
import os
import reprlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ray_ddpo.common.reading import DAMAGED

COLUMNS = ("prompt", "chosen", "rejected")
REWARDS = ("chosen_reward", "rejected_reward")
FORMATS = (".parquet", ".jsonl")
ROWS_OF_A_GROUP = 8  # of a parquet file: what is read to have one row
MOST_PIXELS = 8192 * 8192  # of an image; Pillow warns of more than 89 million
LONGEST = 100  # times the shorter side: scaled to cover a square, a longer image would fill the memory
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
BAD_IMAGE = (*DAMAGED, OSError, SyntaxError, OverflowError, struct.error, zlib.error)  # Pillow raises all of these
SHORT = reprlib.Repr()  # of values in messages
SHORT.maxstring = SHORT.maxother = 200


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A pair of images of one prompt. The images are files, in bytes."""

    prompt: str
    chosen: bytes
    rejected: bytes
    chosen_reward: float | None = None
    rejected_reward: float | None = None


def check_name(path: Path) -> None:
    """Raise ValueError if the file's name does not end as a preference file's."""
    if path.suffix not in FORMATS:
        raise ValueError(f"the preference file {str(path)!r} must end in {' or '.join(FORMATS)}")


def check_new(path: Path) -> None:
    """Check that a new preference file can be written here, with the folder of its images if it is a `.jsonl`.

    Raises:
        ValueError: the name does not end as a preference file's, or the file or the folder exists, or none can be made.
    """
    check_name(path)
    for each in (path, *([_folder_of_images(path)] if path.suffix == ".jsonl" else [])):
        if _state(each, "the output"):
            raise ValueError(f"{str(each)!r} exists: give --output another name")
    above = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "no folder that you may write into" if above.is_dir() else "no folder"
        raise ValueError(
            f"{str(path)!r} cannot be written, because {str(above)!r} is {why}: give --output another name"
        )


def _folder_of_images(path: Path) -> Path:
    return path.with_suffix("")


def _state(path: Path, what: str) -> os.stat_result | None:
    """Return the state of a file or folder; None if it does not exist.

    Raises:
        ValueError: the operating system cannot look it up, as if the path is too long. The line begins with `what`.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        length = f" ({len(str(path))} characters)"
        raise ValueError(f"{what} {SHORT.repr(str(path))}{length} cannot be used: {error.strerror}") from None
    except ValueError as error:  # a path with a NUL character
        raise ValueError(f"{what} {SHORT.repr(str(path))} cannot be used: {error}") from None


def write_preferences(path: Path, preferences: list[Preference]) -> None:
    """Write a new preference file. A `.jsonl` has its images in a folder of the same name beside it.

    Raises:
        ValueError: the file, or the folder, exists or cannot be made.
    """
    check_new(path)
    images = _folder_of_images(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.Table.from_pylist([vars(each) for each in preferences])
        parquet.write_table(table, path, row_group_size=ROWS_OF_A_GROUP)
        return
    images.mkdir()
    lines = []
    for number, each in enumerate(preferences):
        row = dict(vars(each))
        for name in ("chosen", "rejected"):
            file = images / f"{number:06d}_{name}.png"
            file.write_bytes(row[name])
            row[name] = f"{images.name}/{file.name}"
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_preferences(path: Path) -> Iterator[Preference]:
    """Yield the pairs of a preference file, each checked: prompts are texts, and both images are of one size.

    An image is a path, relative to the file's folder, or in a parquet file also the image file's bytes.

    Raises:
        ValueError: the file cannot be used. One line names the file, the row and the column.
    """
    check_there(path)
    count = 0
    for number, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        where = f"{path}, row {number}"
        check_columns(where, row)
        prompt = checked_prompt(where, row["prompt"])
        data = {name: image_bytes(path, f"{where}, {name}", row[name]) for name in ("chosen", "rejected")}
        sizes = {name: decoded_image(f"{where}, {name}", each).size for name, each in data.items()}
        if sizes["chosen"] != sizes["rejected"]:
            raise ValueError(
                f"{where}: the chosen image has {sizes['chosen']} pixels and the rejected one "
                f"{sizes['rejected']}; both must have one size"
            )
        rewards = {name: _reward(f"{where}, {name}", row.get(name)) for name in REWARDS}
        yield Preference(prompt=prompt, chosen=data["chosen"], rejected=data["rejected"], **rewards)
        count += 1
    if not count:
        raise no_rows(path)


def check_there(path: Path) -> None:
    """Raise ValueError if there is no preference file at this path."""
    check_name(path)
    if not _state(path, "the preference file"):
        raise ValueError(
            f"there is no preference file {str(path)!r}: give the path of one, in a recipe as prompts.path; "
            "ddpo preferences RUN --output FILE writes one"
        )
    if not path.is_file():
        raise ValueError(f"the preference file {str(path)!r} is no file")


def check_columns(where: str, row: dict[str, Any]) -> None:
    """Raise ValueError if a row lacks a column."""
    if missing := [name for name in COLUMNS if row.get(name) is None]:
        raise ValueError(f"{where}: it has no {missing[0]!r}; a row has {', '.join(COLUMNS)}")


def no_rows(path: Path) -> ValueError:
    """Return the error of a file without rows."""
    return ValueError(f"the preference file {str(path)!r} has no rows")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its number from 1. The columns are read side by side, so that a damaged one is named."""
    names = parquet_columns(path)
    columns = [parquet_column(path, name) for name in (*COLUMNS, *REWARDS) if name in names]
    if not columns:
        raise ValueError(f"{path} has the columns {SHORT.repr(names)}; a preference file has {', '.join(COLUMNS)}")
    for number, values in enumerate(zip(*columns, strict=True), 1):
        yield number, dict(values)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        ValueError: the file cannot be read, or has a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
    except (*DAMAGED, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {first_line(error)}") from error
    if twice := [name for name in (*COLUMNS, *REWARDS) if names.count(name) > 1]:
        raise ValueError(f"{path} has {names.count(twice[0])} columns {twice[0]!r}, and there may be one")
    return names


def parquet_column(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the column's name and value of each row."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    number = 1
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=[name]):
                for value in batch.column(0):
                    yield name, value.as_py()
                    number += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number}, {name}: it is no UTF-8, and a text must be: {error}") from error
    except (*DAMAGED, OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}, row {number} or a later one, {name}: the column is damaged, write the file again: "
            f"{first_line(error)}"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its number from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield number, json_row(f"{path}, row {number}", line)


def json_row(where: str, line: bytes) -> dict[str, Any]:
    """Parse a line. Raise ValueError if it is no JSON object."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: it is no UTF-8, and a row must be: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"{where}: its lists or objects are nested too deeply, and a row is an object of texts and numbers"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: it is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: it is {SHORT.repr(row)}, and a row must be an object")
    return row


def checked_prompt(where: str, value: object) -> str:
    """Return a row's prompt. Raise ValueError if it is no text."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: the prompt is {SHORT.repr(value)}, and it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of \u escapes
        raise ValueError(f"{where}: the prompt is {SHORT.repr(value)}, which has no UTF-8: {error.reason}") from error
    return value


def _reward(where: str, value: object) -> float | None:
    """Return a finite reward, or None if there is none."""
    if value is None:
        return None
    said = f"{where}: it is {SHORT.repr(value)}, and it must be a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(said)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{said} of at most 1.8e308") from error
    if not math.isfinite(number):
        raise ValueError(f"{said} that is finite")
    return number


def image_bytes(path: Path, where: str, value: object) -> bytes:
    """Return an image file's bytes. Raise ValueError if it cannot be read."""
    if isinstance(value, str):
        file = path.parent / value
        if not _state(file, f"{where}: the image") or not file.is_file():
            raise ValueError(f"{where}: there is no image {str(file)!r}")
        try:
            value = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: the image {str(file)!r} cannot be read: {error.strerror}") from error
    if not isinstance(value, bytes):
        raise ValueError(f"{where}: it is a {type(value).__name__}, and it must be a path or an image file's bytes")
    return value


def decoded_image(where: str, data: bytes) -> Image.Image:
    """Decode an image file, upright as its EXIF orientation says.

    Raises:
        ValueError: it is damaged, too large or too elongated, or has more than 8 bits a channel or transparent pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"Image size ({image.width * image.height} pixels)")
                if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut every value above 255 off
                    raise OSError(
                        f"its pixels are of Pillow's mode {image.mode}; it must have at most 8 bits a channel"
                    )
                image.load()
                upright = ImageOps.exif_transpose(image)
    except TOO_LARGE as error:
        size = str(error).partition(" exceeds")[0]  # Pillow's words: Image size (3600000000 pixels)
        raise ValueError(f"{where}: it is too large: {size}, and an image may have {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:  # whose text has an address in memory
        raise ValueError(f"{where}: it is no image that can be read: no known format") from error
    except BAD_IMAGE as error:
        raise ValueError(f"{where}: it is no image that can be read: {first_line(error)}") from error
    if max(upright.size) > LONGEST * min(upright.size):
        raise ValueError(
            f"{where}: it has {upright.size} pixels, and its longer side may have {LONGEST} times the shorter one's"
        )
    opaque = upright.convert("RGBA").getchannel("A").histogram()[255] if upright.has_transparency_data else None
    if opaque is not None and opaque < upright.width * upright.height:
        raise ValueError(f"{where}: it has transparent pixels, which have no color: put it on a background")
    return upright


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
