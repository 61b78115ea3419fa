"""Writes that a run's storage has refused for the moment. Each is retried before the next one."""

from collections.abc import Callable

from ray_ddpo.common.run_storage.storage import Storage, StorageError


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
        """Write what is waiting.

        Raises:
            StorageError: Some of it is refused again.
        """
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
