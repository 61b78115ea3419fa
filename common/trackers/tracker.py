"""The interface of trackers: one set of metrics per round, and an early check of their requirements."""

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
from ray_ddpo.common.trackers.media import Media

Metrics = dict[str, float]


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run that a tracker gets before the first round."""

    name: str
    folder: str | Path  # the run's folder, a path or a URI
    recipe: dict[str, Any]  # as resolved, plain values
    rounds: int  # in the full run
    first_round: int  # 0, or where a run resumes
    tracker_ids: dict[str, str] = field(default_factory=dict)  # by tracker name, from the checkpoint

    @property
    def storage(self) -> Storage:
        """Return the run's folder."""
        return Storage(self.folder)

    @cached_property
    def local_folder(self) -> Path:
        """Return the run's folder, or a temporary one if it is remote, for trackers that can only write to a disk."""
        if self.storage.local_path is None:
            return Path(tempfile.mkdtemp(prefix=f"ddpo-{self.name}-"))
        self.storage.local_path.mkdir(parents=True, exist_ok=True)
        return self.storage.local_path

    def move_up(self, name: str) -> None:
        """Move a tracker's files `name` from the temporary local folder to the run's folder, if that is remote."""
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
        """Take the metrics of one round, whose index is `metrics["round"]`."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is still buffered, and close."""

    def flush(self) -> None:  # noqa: B027  most trackers buffer nothing
        """Write what the run's folder refused before.

        Raises:
            StorageError: The folder refuses again, so that no checkpoint is committed.
        """

    def show(self, media: Media) -> None:  # noqa: B027  a tracker of numbers alone shows nothing
        """Take images, tables and histograms of a round. They come before the round's metrics."""

    def identity(self) -> str | None:
        """Return the id by which a resumed run continues at the same place of a service; None if none is needed."""
        return None


class Tracker(Component, ABC):
    """A tracker's keys in the recipe."""

    def check(self) -> None:  # noqa: B027  most trackers need nothing
        """Raise ValueError if something that the tracker needs is missing. Called before a run starts."""

    @abstractmethod
    def start(self, run: RunInfo) -> LiveTracker:
        """Open the tracker."""
