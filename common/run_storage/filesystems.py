"""Filesystem operations behind `Storage`: a local disk, and any filesystem of pyarrow."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

READ_ATTEMPTS = 10
UNFINISHED = ".unfinished"  # suffix of a local file while it is written


class LocalFiles:
    """A local disk. All changes go through the six methods at the end."""

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Write to a temporary file, then rename it."""
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident()}{UNFINISHED}")
        self._make_folders(folder)
        try:
            self.put(temporary, data, os.O_TRUNC)
            self.rename(temporary, path)
        except OSError:
            if os.path.exists(temporary):
                self.unlink(temporary)
            raise
        self.sync(folder)  # a power cut must not lose the new name but keep later writes

    def create(self, path: str, data: bytes) -> None:
        self._make_folders(os.path.dirname(path))
        self.put(path, data, os.O_EXCL)

    def append(self, path: str, data: bytes) -> None:
        self._make_folders(os.path.dirname(path))
        before = os.path.getsize(path) if os.path.exists(path) else 0
        try:
            self.put(path, data, os.O_APPEND)
        except OSError:  # undo a partial write, or a retry would append to it
            if os.path.exists(path):
                os.truncate(path, before)
            raise

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def names(self, path: str) -> list[str]:
        return os.listdir(path) if os.path.isdir(path) else []

    def remove(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            for name in self.names(path):
                self.remove(os.path.join(path, name))
            self.remove_folder(path)
        elif os.path.lexists(path):
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                self.unlink(path)

    def _make_folders(self, path: str) -> None:
        """Create a folder and its missing parents, and sync each parent."""
        if os.path.isdir(path):
            return
        if os.path.isfile(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        parent = os.path.dirname(path)
        self._make_folders(parent)
        self.make_folder(path)
        self.sync(parent)

    def put(self, path: str, data: bytes, flag: int) -> None:
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | flag, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            self.sync(file.fileno())

    def sync(self, place: str | int) -> None:
        """Flush a folder, given by path, or an open file to disk."""
        descriptor = os.open(place, os.O_RDONLY) if isinstance(place, str) else place
        try:
            os.fsync(descriptor)
        finally:
            if descriptor != place:
                os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def make_folder(self, path: str) -> None:
        Path(path).mkdir(exist_ok=True)

    def remove_folder(self, path: str) -> None:
        os.rmdir(path)


class RemoteFiles:
    """A filesystem of pyarrow. Object stores replace full objects. All changes go through the last three methods."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, path: str) -> bytes:
        for _ in range(READ_ATTEMPTS):
            with self._filesystem.open_input_stream(path) as stream:
                data = stream.read()
            # pyarrow requests the size that it saw first, so an object replaced by a longer one would arrive truncated.
            if self._filesystem.get_file_info(path).size == len(data):
                return data
        raise OSError(f"{path} is replaced faster than it can be read")

    def write(self, path: str, data: bytes) -> None:
        self.put(path, data)

    def create(self, path: str, data: bytes) -> None:
        if self.exists(path):
            raise FileExistsError(f"{path} exists")
        self.put(path, data)

    def append(self, path: str, data: bytes) -> None:
        self.put(path, (self.read(path) if self.exists(path) else b"") + data)

    def exists(self, path: str) -> bool:
        return self._is(path) is not None

    def names(self, path: str) -> list[str]:
        from pyarrow.fs import FileSelector

        if self._is(path) == "file":
            return []
        return [info.base_name for info in self._filesystem.get_file_info(FileSelector(path, allow_not_found=True))]

    def remove(self, path: str) -> None:
        kind = self._is(path)
        with suppress(FileNotFoundError):  # removed by another process meanwhile
            if kind == "file":
                self.unlink(path)
            elif kind == "folder":
                self.remove_folder(path)

    def _is(self, path: str) -> Literal["file", "folder"] | None:
        from pyarrow.fs import FileType

        kind = self._filesystem.get_file_info(path).type
        return None if kind == FileType.NotFound else "folder" if kind == FileType.Directory else "file"

    def put(self, path: str, data: bytes) -> None:
        try:
            stream = self._filesystem.open_output_stream(path)
        except FileNotFoundError:  # unlike object stores, other filesystems may need folders
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            stream = self._filesystem.open_output_stream(path)
        with stream:
            stream.write(data)

    def unlink(self, path: str) -> None:
        self._filesystem.delete_file(path)

    def remove_folder(self, path: str) -> None:
        self._filesystem.delete_dir(path)


Files = LocalFiles | RemoteFiles  # both work on full paths, with the semantics of `Storage`
