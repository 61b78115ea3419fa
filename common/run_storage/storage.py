"""A folder on a local disk or on any filesystem of pyarrow (`s3://…`, `gs://…`), with a queue of refused writes.

The retry loop is our own: with tenacity, the errors' conversion and the one printed line would need as much code.
"""

import copy
import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from safetensors import SafetensorError

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.run_storage.filesystems import UNFINISHED, Files, LocalFiles, RemoteFiles

T = TypeVar("T")
PATIENCE_SECONDS = 60.0  # for how long requests to an object store are retried
FIRST_PAUSE_SECONDS = 0.5  # before the first retry; each pause doubles
LONGEST_PAUSE_SECONDS = 10.0
EXPECTED = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)  # answers, not failures
PERMANENT_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
# Answers of object stores to requests that no retry can help.
PERMANENT = re.compile(
    r"HTTP status 4(?!08|29)\d\d|ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET"
    r"|RESOURCE_NOT_FOUND|EXPIRED_TOKEN|PERMISSION_DENIED|UNAUTHENTICATED"
)


class StorageError(OSError):
    """A file cannot be read or written: for the moment, as on a full disk, or for good (`permanent`)."""

    def __init__(self, text: str, reason: str = "", permanent: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.permanent = permanent

    @classmethod
    def of(cls, error: Exception, what: str) -> "StorageError":
        """Return the StorageError for an `error` during the operation `what`."""
        reason = getattr(error, "strerror", None) or str(error)
        permanent = getattr(error, "errno", None) in PERMANENT_ERRNOS or bool(PERMANENT.search(reason))
        return cls(f"{what}: {reason}", reason, permanent)


class Storage:
    """A folder, which need not exist yet. File names may contain subfolders (`a/state.json`), not leave the folder."""

    def __init__(self, location: str | Path) -> None:
        """Open a location. Raise ValueError if it is neither a path nor a URI of a known filesystem."""
        self._files, self._root, self.location = _opened(str(location))
        self.patience_seconds = PATIENCE_SECONDS
        # Called before each change, and with True after a failed one. Raises if this process may not write any more.
        self.guard: Callable[[bool], None] | None = None

    @property
    def name(self) -> str:
        """Return the folder's own name."""
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def local_path(self) -> Path | None:
        """Return the folder's path if it is on a local disk."""
        return Path(self._root) if isinstance(self._files, LocalFiles) else None

    def folder(self, name: str) -> "Storage":
        """Return a folder in this one."""
        inner = copy.copy(self)
        inner._root, inner.location = self._path(name), f"{self.location.rstrip('/')}/{name}"
        return inner

    def with_patience(self, seconds: float) -> "Storage":
        """Return the same folder with another limit for retries, and without a guard."""
        other = copy.copy(self)
        other.patience_seconds, other.guard = seconds, None
        return other

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raise FileNotFoundError if there is no such file."""
        return self._asked("read", self._files.read, name)

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: a reader sees the old bytes or the new. Missing folders are created."""
        self._change("written", self._files.write, name, data)

    def create(self, name: str, data: bytes) -> None:
        """Write a new file. Raise FileExistsError if it exists; object stores do not tell between simultaneous calls."""
        self._change("written", self._files.create, name, data)

    def append(self, name: str, data: bytes) -> None:
        """Append to a file. On filesystems that cannot append, the file is written again."""
        self._change("written", self._files.append, name, data)

    def exists(self, name: str) -> bool:
        """Return whether a file or folder of this name exists."""
        return self._asked("looked for", self._files.exists, name)

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of files and folders directly in `folder`; none if it does not exist."""
        found = self._asked("listed", self._files.names, folder)
        return sorted(name for name in found if not name.endswith(UNFINISHED))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents. It need not exist."""
        self._change("removed", self._files.remove, name)

    def sweep(self) -> None:
        """Remove unfinished files directly in this folder. Call it only if no other process writes here."""
        for name in self._asked("listed", self._files.names, ""):
            if name.endswith(UNFINISHED):
                self._change("removed", self._files.remove, name)

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

    def _change(self, done: str, call: Callable[Concatenate[str, ...], None], name: str, *data: bytes) -> None:
        """Change something in the folder, if the guard allows."""
        if self.guard is not None:
            self.guard(False)
        try:
            self._asked(done, call, name, *data)
        except OSError:
            if self.guard is not None:
                self.guard(True)
            raise

    def _asked(self, done: str, call: Callable[Concatenate[str, ...], T], name: str, *data: bytes) -> T:
        """Call a filesystem, on an object store with retries for `patience_seconds`. Raise StorageError if it fails."""
        path, pause, deadline = self._path(name), FIRST_PAUSE_SECONDS, time.monotonic() + self.patience_seconds
        while True:
            try:
                return call(path, *data)
            except EXPECTED:
                raise
            except OSError as error:
                failed = StorageError.of(error, f"{self.location}/{name} cannot be {done}".replace("/ ", " "))
                # Retries do not help with a full or broken disk.
                if failed.permanent or self.local_path is not None or time.monotonic() + pause > deadline:
                    raise failed from error
                if pause == FIRST_PAUSE_SECONDS:
                    print_line(f"{failed}; retrying for {self.patience_seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} leads out of the folder {self.location}: no file there may be called that")
        return f"{self._root.rstrip('/')}/{name}" if name else self._root


@contextmanager
def local_folder(storage: Storage) -> Iterator[Path]:
    """Yield a local folder to write into: the storage itself, or a temporary one that is copied there at the end.

    Raises:
        StorageError: The files could not be written.
    """
    try:
        if storage.local_path is not None:
            storage.local_path.mkdir(parents=True, exist_ok=True)
            yield storage.local_path
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            storage.copy_in(Path(scratch))
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        named = getattr(error, "filename", None)
        if storage.local_path is not None and named and not Path(named).is_relative_to(storage.local_path):
            raise  # about another file, which the body was reading
        raise StorageError.of(error, f"{storage.location} cannot be written") from error


def _opened(location: str) -> tuple[Files, str, str]:
    """Return the filesystem, the root's path in it, and the location to show. Credentials come from the environment."""
    parts = urlsplit(location)
    if "://" not in location or parts.scheme == "file":
        path = os.path.abspath(url2pathname(parts.path) if "://" in location else location)
        return LocalFiles(), path, path
    if "@" in parts.netloc or parts.query or parts.fragment:  # locations are shown, so they must not contain keys
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


class Unwritten:
    """A queue of writes, oldest first, so that files appear in the order in which the run wrote them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, bytes, Callable[[], object]]] = []

    def write(self, storage: Storage, name: str, data: bytes) -> None:
        """Write a file atomically, now or at a later call."""
        self._do(f"{storage.location}/{name}", data, lambda: storage.write(name, data))

    def append(self, storage: Storage, name: str, data: bytes) -> None:
        """Append to a file, now or at a later call."""
        self._do("", b"", lambda: storage.append(name, data))

    def call(self, write: Callable[[], object]) -> None:
        """Call a function that writes several files, now or at a later call."""
        self._do("", b"", write)

    def read(self, storage: Storage, name: str) -> bytes:
        """Return a file's bytes, whether they are written or still waiting."""
        waiting = {place: data for place, data, _ in self._waiting}
        place = f"{storage.location}/{name}"
        return waiting[place] if place in waiting else storage.read(name)

    def flush(self) -> None:
        """Write what is waiting. Raise StorageError if some of it is refused again."""
        while self._waiting:
            self._waiting[0][-1]()
            del self._waiting[0]

    def _do(self, place: str, data: bytes, write: Callable[[], object]) -> None:
        self._waiting.append((place, data, write))
        try:
            self.flush()
        except StorageError as error:  # reported by the `flush` at the end of the round
            if error.permanent:
                raise
