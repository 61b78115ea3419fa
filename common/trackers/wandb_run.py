"""Metrics to Weights & Biases: online where somebody is logged in, else kept on disk for `wandb sync`."""

import math
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import PIL.Image

from ray_ddpo.common.model_files.model_hub import first_line, server_answers
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.trackers.media import CaptionedImage, Media
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package
from ray_ddpo.common.trackers.wandb_files import rounds_in_files

NAME = "wandb"
FOLDER = "wandb"  # where wandb writes, by its own choice
DATA_FOLDER = "WANDB_DATA_DIR"
Mode = Literal["online", "offline", "disabled"]
BINS = 64
FLUSH_SECONDS = 1.0  # between two writings to its file: what it has not written is lost with a process that is killed


class OpenRun(LiveTracker):
    """A run that wandb keeps open in this process. wandb's step is the round, and may not go back.

    A history cannot be changed. What a resumed run does again is not sent again: it has the same bits. What was done
    before the checkpoint and is not in wandb is sent again.
    """

    def __init__(self, run: Any, info: RunInfo, rounds_there: int) -> None:
        """`rounds_there`: so many has wandb of earlier starts."""
        self._run = run
        self._info = info
        self._rounds_there = rounds_there
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        for metrics in _rounds_before(info):
            self.log(metrics)

    def log(self, metrics: Metrics) -> None:
        round = int(metrics["round"])
        if round >= self._rounds_there:
            self._run.log(metrics, step=round, commit=True)

    def show(self, media: Media) -> None:
        if media.round >= self._rounds_there:
            with self._nothing_elsewhere():
                self._run.log(as_wandb_has_it(media), step=media.round, commit=False)

    @contextmanager
    def _nothing_elsewhere(self) -> Iterator[None]:
        """wandb copies what is in a table to where it is sent from: by default in the user's home, and if offline for ever."""
        if DATA_FOLDER in os.environ:
            yield
            return
        os.environ[DATA_FOLDER] = str(self._info.local_folder / FOLDER)
        try:
            yield
        finally:
            del os.environ[DATA_FOLDER]

    def finish(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone may return before all is on disk
        self._info.move_up(FOLDER)

    def identity(self) -> str:
        return self._run.id


class WandbRun(Tracker):
    """Weights & Biases. It never asks for a login. A resumed run resumes the wandb run of its checkpoint."""

    project: str = "ray-ddpo"
    """Project of wandb."""
    entity: str | None = None
    """User or team of wandb. By default that of the login."""
    group: str | None = None
    """Group of runs in wandb. By default none."""
    tags: tuple[str, ...] = ()
    """Tags of the run in wandb."""

    def check(self) -> None:
        require_package(NAME, "wandb")

    def start(self, run: RunInfo) -> OpenRun:
        """Open the run online if a login is found, offline if there is none or the service does not answer.

        Raises:
            ValueError: the service refuses the login or the run.
        """
        import wandb

        identity, (way, why) = run.tracker_ids.get(NAME) or uuid.uuid4().hex[:8], connection()
        try:
            opened = self._open(run, identity, way)
        except wandb.Error as error:
            way, why = "offline", _if_not_reachable(error)
            opened = self._open(run, identity, way)
        if why:
            later = f"wandb sync {run.folder}/{FOLDER}/offline-run-*"
            print(f"tracker wandb: {why}, so the run is kept offline; send it later with: {later}", file=sys.stderr)
        return opened

    def _open(self, run: RunInfo, identity: str, way: Mode) -> OpenRun:
        import wandb

        # Neither terminal output nor code nor the git state: what is in them is not ours to send.
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_transaction_log_flush_interval=FLUSH_SECONDS
        )
        # Before it is opened, for then there is a new file.
        rounds_there = rounds_in_files(run.storage.folder(FOLDER), identity) if way == "offline" else 0
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=run.name,
            config=run.recipe,
            dir=run.local_folder,
            id=identity,
            resume="allow",
            mode=way,
            settings=settings,
        )
        return OpenRun(opened, run, opened.starting_step if way == "online" else rounds_there)


def as_wandb_has_it(media: Media) -> dict[str, Any]:
    """By what it is and then by its panel: `images/evaluation`, `tables/evaluation`, `histograms/reward`."""
    import wandb

    shown: dict[str, Any] = {}
    for panel, images in media.images.items():
        shown[f"images/{panel}"] = [_image(image) for image in images]
    for panel, table in media.tables.items():
        rows = [[_image(cell) if isinstance(cell, CaptionedImage) else cell for cell in row] for row in table.rows]
        shown[f"tables/{panel}"] = wandb.Table(columns=list(table.columns), data=rows)
    for name, values in media.countable.items():
        shown[f"histograms/{name}"] = wandb.Histogram(np_histogram=np.histogram(values, bins=BINS))
    return shown


def _image(image: CaptionedImage) -> Any:
    import wandb

    # From an array wandb would first guess whether to stretch its values.
    return wandb.Image(PIL.Image.fromarray(image.pixels), caption=image.caption or None)


def _rounds_before(info: RunInfo) -> Iterator[Metrics]:
    """The metrics of the rounds before this start's first."""
    folder = RunFolder(info.folder)
    logged = (
        read_json_lines(folder.storage, folder.metrics, ("round",)) if folder.storage.exists(folder.metrics) else []
    )
    for metrics in logged:
        if metrics["round"] < info.first_round:
            yield {name: math.nan if value is None else value for name, value in metrics.items()}


def connection() -> tuple[Mode, str]:
    """Return how wandb works here, and why it is offline if the service does not answer (else an empty text).

    As WANDB_MODE says where it switches the network off; else online if wandb finds a login without asking.

    Raises:
        ValueError: the service refuses the login.
    """
    import wandb

    wanted = os.environ.get("WANDB_MODE")
    if wanted == "disabled" or wanted == "offline":
        return wanted, ""
    try:
        return ("online" if wandb.login(prompt=False) else "offline"), ""
    except wandb.Error as error:
        return "offline", _if_not_reachable(error)


def _if_not_reachable(error: Exception) -> str:
    """Return in words that wandb's service cannot be reached. ValueError: it can, so `error` is the user's to mend."""
    import wandb

    service = wandb.setup().settings.base_url
    if server_answers(service):
        raise ValueError(
            f"trackers: wandb cannot be used with {service}: {first_line(error)}; correct WANDB_API_KEY, or the table's "
            "project and entity, or export WANDB_MODE=offline"
        ) from error
    return f"{service} does not answer"
