"""Reading files: whatever is wrong with a file, the error names it in one line."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import load_file, save_file

from ray_ddpo.common.reading import reading
from ray_ddpo.common.run_storage.reading import read_json, read_json_lines, read_parquet, read_text
from ray_ddpo.common.run_storage.storage import Storage


def table() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"a": [1]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("read", "content", "words"),
    [
        (read_text, b"\xff", "UnicodeDecodeError"),
        (read_json, b"{", "JSONDecodeError"),
        (read_json, b"[]", "it must be a JSON object"),
        (lambda storage, name: read_json(storage, name, ("b",)), b'{"a": 1}', "it lacks ['b']"),
        (
            lambda storage, name: read_json_lines(storage, name, ("a",)),
            b'{"a": 1}\n{"b": 1}\n',
            "line 2, cannot be read",
        ),
        (read_json_lines, b"{}\nnot json\n", "line 2, cannot be read"),
        (read_parquet, b"", "cannot be read"),
        (read_parquet, table()[:40], "cannot be read"),
        (lambda storage, name: read_parquet(storage, name, ("b",)), table(), "it lacks ['b']"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_path(
    read: Callable[..., Any], content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(Storage(tmp_path), "file")
    assert f"{tmp_path}/file" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_text, read_json, read_json_lines, read_parquet])
def test_a_folder_in_a_files_place_is_named_and_a_missing_file_is_missing(
    read: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/folder cannot be read: Is a directory"):
        read(Storage(tmp_path), "folder")
    with pytest.raises(FileNotFoundError):
        read(Storage(tmp_path), "none")


def test_an_intact_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": null}\n{"a"')  # the last line is being written
    assert read_json_lines(Storage(tmp_path), "lines", ("a",)) == [{"a": 1}, {"a": None}]
    (tmp_path / "table").write_bytes(table())
    assert read_parquet(Storage(tmp_path), "table", ("a",)).to_pydict() == {"a": [1]}


def test_weights_that_are_cut_off_are_named_and_a_named_error_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{path} cannot be read, it is damaged: SafetensorError"), reading(path):
        load_file(path)
    with pytest.raises(ValueError, match=f"^{path} is too old$"), reading(path):
        raise ValueError(f"{path} is too old")
