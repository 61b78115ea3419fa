"""Whereabouts: note the image that a worker begins to process, so that the image is known if the worker dies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

ANSWER_SECONDS = 10.0


class Book:
    """The last noted row of each call. A separate actor, which outlives the workers."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def note(self, call: int, row: int) -> None:
        """Note that a call begins to work on a row."""
        self._rows[call] = row

    def last(self, call: int) -> int | None:
        """Return the last row that a call began to work on, and forget it."""
        return self._rows.pop(call, None)


@dataclass(frozen=True)
class Note:
    """A callable for a worker, which returns when a row is noted."""

    book: Any
    call: int

    def __call__(self, row: int) -> None:
        try:
            ray.get(self.book.note.remote(self.call, row), timeout=ANSWER_SECONDS)
        except RayError:
            return  # the book is lost, so finding the image takes another attempt


class Whereabouts:
    """Makes notes for calls and reads them. The actor is started with the first note, which is rare."""

    def __init__(self) -> None:
        self._book: Any = None
        self._calls = 0

    def note(self) -> Note:
        """Return a note for a new call."""
        if self._book is None:
            self._book = ray.remote(num_cpus=0)(Book).remote()
        self._calls += 1
        return Note(self._book, self._calls)

    def last(self, note: Callable[[int], None] | None) -> int | None:
        """Return the last noted row, or None if there was no note or nothing was noted."""
        if not isinstance(note, Note):
            return None
        try:
            return ray.get(note.book.last.remote(note.call), timeout=ANSWER_SECONDS)
        except RayError:
            self._book = None
            return None
