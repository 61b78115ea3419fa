"""All trackers of a run as one: a tracker that breaks in the middle is left out, and the run goes on."""

import sys
from collections.abc import Callable

from common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker


class FanOut:
    """Passes everything on to each tracker, in the recipe's order."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers
        self._live: list[LiveTracker] = []

    def check(self) -> None:
        """ValueError: a tracker's package is missing."""
        for tracker in self._trackers:
            tracker.check()

    def start(self, run: RunInfo) -> None:
        """Open all. What goes wrong here is a mistake in the recipe or the login, and is raised."""
        for tracker in self._trackers:
            try:
                self._live.append(tracker.start(run))
            except BaseException:
                self.finish()  # a bar would go on drawing over the error's text
                raise

    def log(self, metrics: Metrics) -> None:
        """Give one round's metrics to all."""
        self._each(lambda live: live.log(metrics))

    def finish(self) -> None:
        """Close all; none is left to log to."""
        self._each(lambda live: live.finish())
        self._live = []

    def _each(self, call: Callable[[LiveTracker], None]) -> None:
        self._live = [live for live in self._live if _went_well(live, call)]


def _went_well(live: LiveTracker, call: Callable[[LiveTracker], None]) -> bool:
    try:
        call(live)
    # A run of many hours must not end because a disk is full, a service is down or a tracker has a fault of its own.
    except Exception as error:  # noqa: BLE001
        print(
            f"tracker {type(live).__name__} failed and is left out from here on: {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True
