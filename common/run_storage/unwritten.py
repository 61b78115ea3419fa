"""Unwritten: files that a run's storage has refused for the moment; each is tried again before the next one is written."""

from collections.abc import Callable

from ray_ddpo.common.run_storage.storage import Storage, StorageError


class Unwritten:
    """A queue, oldest first, so that files come to lie in the order in which the run made them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, bytes, Callable[[], object]]] = []

    def write(self, storage: Storage, name: str, data: bytes) -> None:
        """Write a whole file, now or at a later call."""
        self._do(f"{storage.location}/{name}", data, lambda: storage.write(name, data))

    def append(self, storage: Storage, name: str, data: bytes) -> None:
        """Add to a file's end, now or at a later call."""
        self._do("", b"", lambda: storage.append(name, data))

    def call(self, write: Callable[[], object]) -> None:
        """Do something that writes more than one file, now or at a later call."""
        self._do("", b"", write)

    def read(self, storage: Storage, name: str) -> bytes:
        """Return a file's bytes, whether they are written or still waiting."""
        waiting = {place: data for place, data, _ in self._waiting}
        place = f"{storage.location}/{name}"
        return waiting[place] if place in waiting else storage.read(name)

    def flush(self) -> None:
        """Write what is waiting. StorageError: some of it is refused again."""
        while self._waiting:
            self._waiting[0][-1]()
            del self._waiting[0]

    def _do(self, place: str, data: bytes, write: Callable[[], object]) -> None:
        self._waiting.append((place, data, write))
        try:
            self.flush()
        except StorageError as error:  # said by whoever calls `flush` at the end of the round
            if error.permanent:
                raise
