"""Whereabouts: which image a worker had in hand, told before it begins, so that it is known of one that dies over it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

ANSWER_SECONDS = 10.0


class Book:
    """The last row that was noted, by the number of the call. An actor of its own, which outlives the workers."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def note(self, call: int, row: int) -> None:
        """Remember that the call has begun with this row."""
        self._rows[call] = row

    def last(self, call: int) -> int | None:
        """Return the last row that the call has begun with, and forget it."""
        return self._rows.pop(call, None)


@dataclass(frozen=True)
class Note:
    """What a worker is given: it returns once the row is written down."""

    book: Any
    call: int

    def __call__(self, row: int) -> None:
        try:
            ray.get(self.book.note.remote(self.call, row), timeout=ANSWER_SECONDS)
        except RayError:
            return  # the book is lost: then it takes another attempt to find the image


class Whereabouts:
    """Gives out notes and reads them. The actor is started when the first one is asked for, which is rare."""

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
        """Return the row that was in hand; None if no note was given or none was written."""
        if not isinstance(note, Note):
            return None
        try:
            return ray.get(note.book.last.remote(note.call), timeout=ANSWER_SECONDS)
        except RayError:
            self._book = None
            return None
