"""StragglerDetector: detect tasks that take much longer than the median of recent tasks; no clock."""

from collections import deque
from statistics import median

FEWEST = 3  # tasks that must be done before a median means anything
REMEMBERED = 32  # recent tasks
SHORTEST_SECONDS = 1.0  # below, the jitter of a busy machine would look like a fault


class StragglerDetector:
    """The seconds per image of recent tasks. Tasks of evaluation may have more images than those of training."""

    def __init__(self, straggler_factor: float) -> None:
        self._factor = straggler_factor
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._median = 0.0

    def add(self, seconds: float, images: int) -> None:
        """Add the duration of a finished task."""
        self._seconds.append(seconds / images)
        self._median = median(self._seconds)

    def is_straggler(self, seconds: float, images: int) -> bool:
        """Return whether a running task has taken more than the factor times the median."""
        if len(self._seconds) < FEWEST:
            return False
        return seconds > max(SHORTEST_SECONDS, self._factor * self._median * images)
