"""A Python function that takes each round's metrics: `on_round` of `ray_ddpo.train`. A recipe cannot name it."""

from collections.abc import Callable

from pydantic import PrivateAttr

from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker


class _LiveCallback(LiveTracker):
    """The function while a run is active."""

    def __init__(self, function: Callable[[Metrics], object]) -> None:
        self._function = function

    def log(self, metrics: Metrics) -> None:
        self._function(dict(metrics))

    def finish(self) -> None:
        """Do nothing: a function holds nothing back."""


class Callback(Tracker):
    """A function that is called after each round, in the driver's process."""

    _function: Callable[[Metrics], object] = PrivateAttr()

    @classmethod
    def of(cls, function: Callable[[Metrics], object]) -> "Callback":
        """Make the tracker of a function."""
        tracker = cls()
        tracker._function = function
        return tracker

    def start(self, run: RunInfo) -> LiveTracker:
        return _LiveCallback(self._function)
