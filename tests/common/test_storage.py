"""Storage: the same on a disk and in an object store, and the guarantees of each when something fails."""

import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from ray_ddpo.common.run_storage.filesystems import UNFINISHED, LocalFiles, RemoteFiles
from ray_ddpo.common.run_storage.storage import Storage, local_folder


@pytest.fixture(params=["disk", "s3", "pyarrow's disk"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "run")
    return Storage(f"{request.getfixturevalue('bucket')}/runs/one") if request.param == "s3" else of_pyarrow(tmp_path)


def of_pyarrow(path: Path) -> Storage:
    """Return a disk's folder through pyarrow's own filesystem, which stands for filesystems other than disk and S3."""
    storage = Storage(path / "through_pyarrow")
    storage._files, storage._root = RemoteFiles(fs.SubTreeFileSystem(str(path), fs.LocalFileSystem())), "one"
    return storage


def test_a_file_is_read_back_and_replaced_completely(storage: Storage) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    storage.write("folder/file", data)
    assert storage.read("folder/file") == data
    storage.write("folder/file", b"")
    assert storage.read("folder/file") == b""


def test_what_is_not_there_says_so(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    assert not storage.exists("nothing") and storage.names("nothing") == []
    storage.remove("nothing")


def test_children_are_named_in_order_and_grandchildren_are_not(storage: Storage) -> None:
    for name in ("folder/b/deep", "folder/c", "folder/a"):
        storage.write(name, b"1")
    assert storage.names("folder") == ["a", "b", "c"] == storage.folder("folder").names()
    assert storage.names("folder/b") == ["deep"] and storage.names("folder/a") == []
    assert storage.exists("folder") and storage.exists("folder/b") and storage.exists("folder/b/deep")


def test_a_folder_goes_with_all_that_is_in_it(storage: Storage) -> None:
    for name in ("folder/b/deep", "folder/a", "folder_of_another_name"):
        storage.write(name, b"1")
    storage.remove("folder")
    assert not storage.exists("folder/b/deep") and not storage.exists("folder")
    assert storage.read("folder_of_another_name") == b"1"
    storage.remove("folder_of_another_name")
    assert not storage.exists("folder_of_another_name")


def test_lines_are_added_at_the_end(storage: Storage) -> None:
    for line in (b"one\n", b"two\n"):
        storage.append("folder/lines", line)
    assert storage.read("folder/lines") == b"one\ntwo\n"


def test_a_file_that_is_there_is_not_created_again(storage: Storage) -> None:
    storage.create("folder/file", b"first")
    with pytest.raises(FileExistsError):
        storage.create("folder/file", b"second")
    assert storage.read("folder/file") == b"first"


def test_a_folder_is_copied_in_and_out(storage: Storage, tmp_path: Path) -> None:
    with local_folder(storage.folder("folder")) as path:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "one").write_bytes(b"1")
        (path / "two").write_bytes(b"2")
    assert storage.read("folder/deep/one") == b"1" and storage.read("folder/two") == b"2"
    storage.copy_out("folder", tmp_path / "out")
    assert (tmp_path / "out/folder/deep/one").read_bytes() == b"1"
    assert (tmp_path / "out/folder/two").read_bytes() == b"2"


@pytest.mark.parametrize("given", ["{}", "file://{}", "{}/"])
def test_a_path_and_a_file_uri_are_the_disk(given: str, tmp_path: Path) -> None:
    storage = Storage(given.format(tmp_path))
    storage.write("a b/file", b"1")
    assert storage.location == str(tmp_path) and storage.local_path == tmp_path
    assert (tmp_path / "a b" / "file").read_bytes() == b"1"


def test_a_relative_path_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs")
    monkeypatch.chdir("/")
    storage.folder("one").write("file", b"1")
    assert (tmp_path / "runs/one/file").exists() and storage.folder("one").location == str(tmp_path / "runs/one")


def test_an_object_store_has_no_local_path(bucket: str) -> None:
    inner = Storage(bucket).folder("runs").folder("one")
    assert inner.local_path is None and inner.location == f"{bucket}/runs/one" and inner.name == "one"


@pytest.mark.parametrize(
    "location", ["s3://key:hidden@bucket/runs", "s3://bucket/runs?secret=hidden", "s3://bucket/runs#hidden"]
)
def test_a_key_in_a_location_is_refused_and_not_repeated(location: str) -> None:
    with pytest.raises(ValueError, match="keys and endpoint come from the environment") as error:
        Storage(location)
    assert "hidden" not in str(error.value)


def test_an_unknown_filesystem_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("the location 'floppy://runs' cannot be used")):
        Storage("floppy://runs")


@pytest.mark.parametrize("operation", ["put", "sync", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    storage.write("file", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalFiles, operation, fail)
    with pytest.raises(OSError, match="no space"):
        storage.write("file", b"new")
    assert os.listdir(tmp_path) == ["file"] and storage.read("file") == b"old"


def test_a_line_that_was_not_added_completely_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.append("lines", b"one\n")
    with monkeypatch.context() as full:
        full.setattr(LocalFiles, "sync", lambda *_: os.write(-1, b""))  # an OSError, after the data is written
        with pytest.raises(OSError, match=r"lines cannot be written: Bad file descriptor"):
            storage.append("lines", b"two\n")
    storage.append("lines", b"three\n")
    assert storage.read("lines") == b"one\nthree\n"


def test_what_a_dead_writer_left_is_neither_listed_nor_kept(tmp_path: Path) -> None:
    (tmp_path / f".file.1-2{UNFINISHED}").write_bytes(b"half")
    storage = Storage(tmp_path)
    assert storage.names() == []
    storage.sweep()
    assert os.listdir(tmp_path) == []


def test_a_name_outlives_a_power_cut_before_what_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def recorded(name: str):
        original = getattr(LocalFiles, name)

        def call(files: LocalFiles, place: str | int, *rest: object) -> None:
            done.append((name, os.path.basename(place) if isinstance(place, str) else "data"))
            original(files, place, *rest)

        return call

    for name in ("rename", "sync", "make_folder"):
        monkeypatch.setattr(LocalFiles, name, recorded(name))
    Storage(tmp_path).write("folder/file", b"1")
    assert [kind for kind, _ in done] == ["make_folder", "sync", "sync", "rename", "sync"]
    assert [place for _, place in done][:3] == ["folder", tmp_path.name, "data"] and done[-1] == ("sync", "folder")


def test_an_object_replaced_during_a_read_comes_back_complete(bucket: str) -> None:
    storage, stop = Storage(bucket), threading.Event()
    contents = {b"short", b"longer " * 100}

    def replace() -> None:
        while not stop.is_set():
            for data in contents:
                storage.write("object", data)
                time.sleep(0.02)

    storage.write("object", b"short")
    thread = threading.Thread(target=replace)
    thread.start()
    found = {storage.read("object") for _ in range(60)}
    stop.set()
    thread.join()
    assert found == contents
