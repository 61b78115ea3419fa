"""Fake actors and calls, for tests of the driver's schedulers without Ray."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_numbers = itertools.count()


@dataclass(frozen=True)
class Call:
    """A method that returns fresh numbers for references."""

    returns: int = 1

    def options(self, num_returns: int = 1, **_: Any) -> "Call":
        return Call(num_returns)

    def remote(self, *_: Any) -> Any:
        numbers = tuple(next(_numbers) for _ in range(self.returns))
        return numbers if self.returns > 1 else numbers[0]


@dataclass(eq=False)
class Actor:
    """Any actor."""

    ready: Call = field(default_factory=Call)
    sample: Call = field(default_factory=Call)
    forget: Call = field(default_factory=Call)
    score: Call = field(default_factory=Call)
    score_together: Call = field(default_factory=Call)


class Answers:
    """In the place of the module ray: `get` gives what `say` said, or True."""

    def __init__(self) -> None:
        self._said: dict[Any, Callable[[], Any]] = {}

    def say(self, reference: Any, answer: Callable[[], Any]) -> None:
        """What `get` is to do for this reference."""
        self._said[reference] = answer

    def get(self, reference: Any) -> Any:
        return self._said.pop(reference, lambda: True)()

    def kill(self, actor: Any) -> None:
        """Nothing lives."""


class Nowhere:
    """In the place of `Whereabouts`: `row` was in hand."""

    def __init__(self) -> None:
        self.row: int | None = None

    def note(self) -> Callable[[int], None]:
        return lambda row: None

    def last(self, note: Callable[[int], None] | None) -> int | None:
        return self.row if note else None
