"""The death of an actor's process, in the words of the terminal: by which exit code or signal, as far as Ray knows."""

import re
from dataclasses import dataclass

# Ray's texts (2.60) on the left. It tells no signal but SIGTERM, and no exit code of a process that did not end in Python.
RAYS_CAUSES = (
    (re.compile(r"receives a SIGTERM"), "SIGTERM"),
    (re.compile(r"exit code:? (\d+)", re.IGNORECASE), r"exit code \1"),
    (
        re.compile(r"OUT_OF_MEMORY|running low on memory|memory pressure"),
        "ended by Ray, because its machine ran low on memory",
    ),
    (re.compile(r"node (has )?(died|is dead)|node failure", re.IGNORECASE), "its machine is gone"),
)
RAYS_CRASH = re.compile(r"connection error code 2|worker process has died")
RAYS_BEGINNING = "The actor"
LONGEST_CAUSE = 200
LOADING = "while it was loading"  # what an actor was at that died before it had all its parts


@dataclass(frozen=True)
class Death:
    """The end of an actor's process, or the driver's decision to end it."""

    number: int | None  # of the actor in its role; None if it is not known which one died
    reason: str  # Ray's text, or the driver's own reason to end it
    at: str  # what the actor was at, in words: "at round 2, task 1"

    @property
    def by_driver(self) -> bool:
        """Whether the driver ended the process, which hung."""
        return not self.reason.startswith(RAYS_BEGINNING)


def cause_of(reason: str) -> str | None:
    """Return in a few words how a process ended. None: it crashed or was killed, and Ray does not know how."""
    for pattern, words in RAYS_CAUSES:
        if found := pattern.search(reason):
            return found.expand(words)
    if RAYS_CRASH.search(reason):
        return None
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[-1][:LONGEST_CAUSE] if lines else None


def in_one_line(reason: str) -> str:
    """Return the same where nothing else is known of a process."""
    return cause_of(reason) or "its process crashed or was killed"
