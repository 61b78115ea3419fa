"""Storage: a folder on a local disk, or on any filesystem that pyarrow speaks (`s3://…`, `gs://…`)."""

import copy
import errno
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

READ_ATTEMPTS = 10
UNFINISHED = ".unfinished"  # the end of a local file's name while it is written


class Storage:
    """A folder, which need not be there yet. A name may lead through folders in it, `a/state.json`, never out (ValueError)."""

    def __init__(self, location: str | Path) -> None:
        """ValueError: the location is no path and no URI of a filesystem that is known."""
        self._files, self._root, self.location = _opened(str(location))

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def local_path(self) -> Path | None:
        """The folder's path, if it is on a disk of this machine."""
        return Path(self._root) if isinstance(self._files, LocalFiles) else None

    def folder(self, name: str) -> "Storage":
        """A folder in this one."""
        inner = copy.copy(self)
        inner._root, inner.location = self._path(name), f"{self.location.rstrip('/')}/{name}"
        return inner

    def read(self, name: str) -> bytes:
        """A file's bytes. FileNotFoundError: it is not there."""
        return self._files.read(self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file: a reader sees the old bytes or the new. Folders on the way are made."""
        self._files.write(self._path(name), data)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that is not there. FileExistsError: it is. Of two at once one wins, but for an object store."""
        self._files.create(self._path(name), data)

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end; where the filesystem cannot, the file is written anew."""
        self._files.append(self._path(name), data)

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""
        return self._files.exists(self._path(name))

    def names(self, folder: str = "") -> list[str]:
        """The names of files and folders directly in `folder`, sorted; none where it is not there."""
        found = self._files.names(self._path(folder))
        return sorted(name for name in found if not name.endswith(UNFINISHED))

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it. It need not be there."""
        self._files.remove(self._path(name))

    def sweep(self) -> None:
        """Remove what writers left unfinished directly in this folder. Only for who alone writes here."""
        for name in self._files.names(self._root):
            if name.endswith(UNFINISHED):
                self._files.remove(self._path(name))

    def copy_in(self, folder: Path) -> None:
        """Write every file below a local folder here, under the same names."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.write(path.relative_to(folder).as_posix(), path.read_bytes())

    def copy_out(self, name: str, folder: Path) -> None:
        """Copy the file or folder `name` into a local folder, under the same name."""
        children = self.names(name)
        for child in children:
            self.copy_out(f"{name}/{child}" if name else child, folder)
        if not children and self.exists(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.read(name))

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} leads out of the folder {self.location}: no file there may be called that")
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


@contextmanager
def local_folder(storage: Storage) -> Iterator[Path]:
    """A folder on this machine to write into: the storage itself, or one that is copied there at the end."""
    if storage.local_path is not None:
        storage.local_path.mkdir(parents=True, exist_ok=True)
        yield storage.local_path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        storage.copy_in(Path(scratch))


class Files(ABC):
    """What a kind of filesystem does, by its own full paths; the same as the methods of `Storage`."""

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def write(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def create(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def append(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def names(self, path: str) -> list[str]: ...

    @abstractmethod
    def remove(self, path: str) -> None: ...


class LocalFiles(Files):
    """A disk. Everything that changes it goes through the six operations at the end."""

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
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
        self.sync(folder)  # or the new name might not outlive a power cut that what follows outlives

    def create(self, path: str, data: bytes) -> None:
        self._make_folders(os.path.dirname(path))
        self.put(path, data, os.O_EXCL)

    def append(self, path: str, data: bytes) -> None:
        self._make_folders(os.path.dirname(path))
        self.put(path, data, os.O_APPEND)

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
            with suppress(FileNotFoundError):  # somebody else was faster
                self.unlink(path)

    def _make_folders(self, path: str) -> None:
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
        """Of a folder's path, or of an open file."""
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


class RemoteFiles(Files):
    """A filesystem of pyarrow's. Object stores replace whole objects; what changes it is the three operations at the end."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, path: str) -> bytes:
        for _ in range(READ_ATTEMPTS):
            with self._filesystem.open_input_stream(path) as stream:
                data = stream.read()
            # pyarrow asks for as many bytes as there were: a longer object in its place would come back cut off.
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
        with suppress(FileNotFoundError):  # somebody else was faster
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
        except FileNotFoundError:  # an object store needs no folders, others may
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            stream = self._filesystem.open_output_stream(path)
        with stream:
            stream.write(data)

    def unlink(self, path: str) -> None:
        self._filesystem.delete_file(path)

    def remove_folder(self, path: str) -> None:
        self._filesystem.delete_dir(path)


def _opened(location: str) -> tuple[Files, str, str]:
    """The files, the root's path among them, and the location to name it by. Keys come from the environment alone."""
    parts = urlsplit(location)
    if "://" not in location or parts.scheme == "file":
        path = os.path.abspath(url2pathname(parts.path) if "://" in location else location)
        return LocalFiles(), path, path
    if "@" in parts.netloc or parts.query or parts.fragment:  # the location is shown, and is no place for a key
        raise ValueError(
            f"a location of {parts.scheme}:// is given with a user, a query or a fragment: it must be "
            f"{parts.scheme}://bucket/folder, and keys and endpoint come from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL …)"
        )
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        filesystem, root = FileSystem.from_uri(location)
    except (ArrowException, OSError) as error:
        raise ValueError(f"the location {location!r} cannot be used: {error}") from error
    return RemoteFiles(filesystem), root, location.rstrip("/")
