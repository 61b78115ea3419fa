"""Read files of a run. Any error becomes one line that names the file."""

from typing import TYPE_CHECKING

from ray_ddpo.common.reading import Object, object_in, parquet_table, reading
from ray_ddpo.common.run_storage.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa


def read_text(storage: Storage, name: str) -> str:
    """Return a file's text. Raise ValueError if it is not UTF-8."""
    with reading(_path(storage, name)):
        return storage.read(name).decode()


def read_json(storage: Storage, name: str, keys: tuple[str, ...] = ()) -> Object:
    """Return the object in a JSON file. Raise ValueError if there is none, or if a key is missing."""
    with reading(_path(storage, name)):
        return object_in(storage.read(name), keys)


def read_json_lines(storage: Storage, name: str, keys: tuple[str, ...] = ()) -> list[Object]:
    """Return the objects of a JSONL file, without an incomplete last line. Raise ValueError as `read_json` does."""
    lines = [line for line in read_text(storage, name).splitlines(keepends=True) if line.endswith("\n")]
    found = []
    for number, line in enumerate(lines, start=1):
        with reading(f"{_path(storage, name)}, line {number},"):
            found.append(object_in(line, keys))
    return found


def read_parquet(storage: Storage, name: str, columns: tuple[str, ...] = ()) -> "pa.Table":
    """Return the table in a parquet file. Raise ValueError if there is none, or if a column is missing."""
    with reading(_path(storage, name)):
        data = storage.read(name)
    return parquet_table(data, _path(storage, name), columns)


def _path(storage: Storage, name: str) -> str:
    return f"{storage.location.rstrip('/')}/{name}"
