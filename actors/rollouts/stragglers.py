"""StragglerDetector: how long an image of a task takes its peers, and so when one is overdue; no clock of its own."""

from collections import deque
from statistics import median

FEWEST = 3  # with fewer tasks done nobody knows what is usual
REMEMBERED = 32
SHORTEST_SECONDS = 1.0  # below, a busy machine's jitter would look like a fault


class StragglerDetector:
    """Remembers the last tasks' seconds an image: tasks of an evaluation may have more of them than those of a round."""

    def __init__(self, straggler_factor: float) -> None:
        self._factor = straggler_factor
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._usual = 0.0  # their median

    def add(self, seconds: float, images: int) -> None:
        """A task of so many images was done in so many seconds."""
        self._seconds.append(seconds / images)
        self._usual = median(self._seconds)

    def is_straggler(self, seconds: float, images: int) -> bool:
        """Whether a task of so many images that has taken so many seconds is over the factor of its peers' median."""
        if len(self._seconds) < FEWEST:
            return False
        return seconds > max(SHORTEST_SECONDS, self._factor * self._usual * images)
