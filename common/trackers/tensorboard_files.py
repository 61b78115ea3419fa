"""Metrics as TensorBoard's event files, in the folder `tensorboard` of the run's."""

from typing import Any

from common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package

FOLDER = "tensorboard"


class EventFiles(LiveTracker):
    """The open writer."""

    def __init__(self, writer: Any, run: RunInfo) -> None:
        self._writer = writer
        self._run = run

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=int(metrics["round"]))
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()
        self._run.move_up(FOLDER)


class TensorboardFiles(Tracker):
    """No keys: the folder is part of what a run leaves."""

    def check(self) -> None:
        require_package("tensorboard", "tensorboard")

    def start(self, run: RunInfo) -> EventFiles:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier start wrote of the rounds that a resumed run does again.
        return EventFiles(SummaryWriter(run.local_folder / FOLDER, purge_step=run.first_round), run)
