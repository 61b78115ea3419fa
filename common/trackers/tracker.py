"""What every tracker promises: to take one set of metrics a round, and to say early what it lacks."""

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.registry import Entry
from common.trackers import TRACKERS

Metrics = dict[str, float]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run before its first round."""

    name: str
    folder: Path
    recipe: dict[str, Any]  # as resolved, plain values
    rounds: int  # in the whole run
    first_round: int  # 0, or where a resumed run goes on


class LiveTracker(ABC):
    """A tracker that is open for one run."""

    @abstractmethod
    def log(self, metrics: Metrics) -> None:
        """Take the metrics of one round; `metrics["round"]` says which."""

    @abstractmethod
    def finish(self) -> None:
        """Write out what is still held, and close."""


class Tracker(Entry, ABC):
    """A tracker's keys in the recipe."""

    @abstractmethod
    def check(self) -> None:
        """ValueError where its package is missing; asked before a run starts."""

    @abstractmethod
    def start(self, run: RunInfo) -> LiveTracker:
        """Open it."""


def require_package(tracker: str, package: str) -> None:
    """ValueError, which names the package and the other trackers, where what `tracker` needs is not installed."""
    if importlib.util.find_spec(package) is None:
        others = sorted(set(TRACKERS) - {tracker})
        raise ValueError(
            f"trackers.name is {tracker!r}, and its package {package!r} is not installed: "
            f"pip install {package}, or name one of {others}"
        )
