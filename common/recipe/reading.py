"""Read a file of a run or of the user's: whatever is wrong with it becomes one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ray_ddpo.common.run_storage.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

# What a library raises over bytes that are not what it expects. pyarrow's own errors are of these kinds too.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, SafetensorError)
Object = dict[str, Any]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside into a ValueError that names `path`. A FileNotFoundError stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        if str(path) in str(error):  # it is named already
            raise
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read, it is damaged: {type(error).__name__}: {said}") from error


def read_text(storage: Storage, name: str) -> str:
    """Return a file's text. ValueError: it is not UTF-8."""
    with reading(_path(storage, name)):
        return storage.read(name).decode()


def read_json(storage: Storage, name: str, keys: tuple[str, ...] = ()) -> Object:
    """Return the object in a JSON file. ValueError: there is none in it, or it lacks one of `keys`."""
    with reading(_path(storage, name)):
        return _object(storage.read(name), keys)


def read_json_lines(storage: Storage, name: str, keys: tuple[str, ...] = ()) -> list[Object]:
    """Return the objects of a JSONL file, without a last line that a kill cut off.

    Raises:
        ValueError: a line is no object, or lacks one of `keys`.
    """
    lines = [line for line in read_text(storage, name).splitlines(keepends=True) if line.endswith("\n")]
    found = []
    for number, line in enumerate(lines, start=1):
        with reading(f"{_path(storage, name)}, line {number},"):
            found.append(_object(line, keys))
    return found


def read_parquet(storage: Storage, name: str, columns: tuple[str, ...] = ()) -> "pa.Table":
    """Return the table in a parquet file. ValueError: there is none in it, or it lacks one of `columns`."""
    with reading(_path(storage, name)):
        data = storage.read(name)
    return parquet_table(data, _path(storage, name), columns)


def parquet_table(data: bytes, path: str, columns: tuple[str, ...] = ()) -> "pa.Table":
    """Return the table in a parquet file's bytes. ValueError: there is none in it, or it lacks one of `columns`."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with reading(path):
        table = parquet.read_table(pa.BufferReader(data))
        _check_keys(table.column_names, columns)
    return table


def _path(storage: Storage, name: str) -> str:
    return f"{storage.location.rstrip('/')}/{name}"


def _object(text: str | bytes, keys: tuple[str, ...]) -> Object:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, and is {str(value)[:40]!r}")
    _check_keys(value, keys)
    return value


def _check_keys(there: Any, keys: tuple[str, ...]) -> None:
    lacking = [key for key in keys if key not in there]
    if lacking:
        raise ValueError(f"it lacks {lacking}")
