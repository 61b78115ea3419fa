"""TensorBoard's event files: a resumed run hides what it does again."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.trackers.tensorboard_files import TensorboardFiles
from common.trackers.tracker import RunInfo


def log(folder: Path, first_round: int, losses: dict[int, float]) -> None:
    live = TensorboardFiles().start(RunInfo("run", folder, {}, 10, first_round))
    for round, loss in losses.items():
        live.log({"round": float(round), "loss": loss})
    live.finish()


def test_rounds_that_are_done_again_are_shown_once_with_their_new_value(tmp_path: Path) -> None:
    log(tmp_path, 0, {0: 1.0, 1: 2.0, 2: 3.0})
    log(tmp_path, 1, {1: 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 20.0)]
