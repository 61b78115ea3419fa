"""Turn any error while reading a file into one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import pyarrow as pa

# What libraries raise on unexpected bytes. pyarrow's own errors are subclasses of these.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, EOFError, SafetensorError)
Object = dict[str, Any]


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors of the body into a ValueError that names `path`. A FileNotFoundError passes unchanged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except DAMAGED as error:
        if str(path) in str(error):  # already named
            raise
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be read, it is damaged: {type(error).__name__}: {said}") from error


def parquet_table(data: bytes, path: str, columns: tuple[str, ...] = ()) -> "pa.Table":
    """Return the table in a parquet file's bytes. Raise ValueError if there is none, or if a column is missing."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with reading(path):
        table = parquet.read_table(pa.BufferReader(data))
        check_keys(table.column_names, columns)
    return table


def object_in(text: str | bytes, keys: tuple[str, ...]) -> Object:
    """Return the JSON object in a text. Raise ValueError if there is none, or if a key is missing."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, and is {str(value)[:40]!r}")
    check_keys(value, keys)
    return value


def check_keys(there: Any, keys: tuple[str, ...]) -> None:
    """Raise ValueError if a key is missing."""
    lacking = [key for key in keys if key not in there]
    if lacking:
        raise ValueError(f"it lacks {lacking}")
