"""Describe the death of an actor's process in words: the exit code or signal, as far as Ray knows."""

import re
from dataclasses import dataclass

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

# What a call of an actor raises if the actor's process has ended. Ray's memory monitor has an error of its own.
PROCESS_ENDED = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)

# Ray's texts (2.60) → words. Ray reports no signal but SIGTERM, and no exit code of a process that Python did not end.
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
RAYS_BEGINNING = re.compile(r"The (actor|node|worker)|\d+ worker\(s\) were killed")
LONGEST_CAUSE = 200
LOADING = "while it was loading"  # the activity of an actor that died before it had all its parts


@dataclass(frozen=True)
class Death:
    """The end of an actor's process, possibly by the driver's decision."""

    number: int | None  # the actor's number in its role; None if unknown
    reason: str  # Ray's text, or the driver's own reason to end it
    at: str  # the actor's activity in words: "at round 2, task 1"

    @property
    def by_driver(self) -> bool:
        """Return whether the driver ended the process because it hung."""
        return not RAYS_BEGINNING.match(self.reason)


def cause_of(reason: str) -> str | None:
    """Describe how a process ended; None if it crashed or was killed in a way that Ray does not know."""
    for pattern, words in RAYS_CAUSES:
        if found := pattern.search(reason):
            return found.expand(words)
    if RAYS_CRASH.search(reason):
        return None
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[-1][:LONGEST_CAUSE] if lines else None


def in_one_line(reason: str) -> str:
    """Describe how a process ended, also if Ray does not know."""
    return cause_of(reason) or "its process crashed or was killed"
