"""What every tracker promises: to take one set of metrics a round, and to say early what it lacks."""

import importlib.util
import shutil
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.media import Media

Metrics = dict[str, float]


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of the run before its first round."""

    name: str
    folder: str | Path  # the run's, a path or a URI
    recipe: dict[str, Any]  # as resolved, plain values
    rounds: int  # in the whole run
    first_round: int  # 0, or where a resumed run goes on
    tracker_ids: dict[str, str] = field(default_factory=dict)  # by tracker's name, of the checkpoint it goes on from

    @property
    def storage(self) -> Storage:
        """The run's folder."""
        return Storage(self.folder)

    @cached_property
    def local_folder(self) -> Path:
        """The run's folder, or one on this machine in its place, for trackers that write to a disk only."""
        if self.storage.local_path is None:
            return Path(tempfile.mkdtemp(prefix=f"ddpo-{self.name}-"))
        self.storage.local_path.mkdir(parents=True, exist_ok=True)
        return self.storage.local_path

    def move_up(self, name: str) -> None:
        """Move what a tracker has written to `name` in the local folder into the run's, where that is elsewhere."""
        if self.storage.local_path is not None:
            return
        self.storage.folder(name).copy_in(self.local_folder / name)
        shutil.rmtree(self.local_folder / name)
        with suppress(OSError):  # another tracker still has something there
            self.local_folder.rmdir()


class LiveTracker(ABC):
    """A tracker that is open for one run."""

    @abstractmethod
    def log(self, metrics: Metrics) -> None:
        """Take the metrics of one round; `metrics["round"]` says which."""

    @abstractmethod
    def finish(self) -> None:
        """Write out what is still held, and close."""

    def flush(self) -> None:  # noqa: B027  a tracker elsewhere holds nothing back
        """Write into the run's folder what it refused before. StorageError: it refuses again; no checkpoint is committed."""

    def show(self, media: Media) -> None:  # noqa: B027  a tracker of numbers alone shows nothing
        """Take images, tables and histograms, before the metrics of their round, which end it."""

    def identity(self) -> str | None:
        """What a resumed run must be told to go on in the same place of a service; None where the folder says it."""
        return None


class Tracker(Component, ABC):
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
