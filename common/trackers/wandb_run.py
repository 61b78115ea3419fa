"""Metrics to Weights & Biases: online with a login, otherwise in local files for `wandb sync`.

wandb's local files are protobuf records in LevelDB's log format, from which a resumed run reads the logged rounds.
"""

import io
import json
import math
import os
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import PIL.Image

from ray_ddpo.common.model_files.model_hub import first_line, server_answers
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.trackers.media import CaptionedImage, Media
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker
from ray_ddpo.common.video_files import mp4

NAME = "wandb"
FOLDER = "wandb"  # wandb's own choice
DATA_FOLDER = "WANDB_DATA_DIR"
Mode = Literal["online", "offline", "disabled"]
BINS = 64
FLUSH_SECONDS = 1.0  # between writes to wandb's file; a killed process loses what is not written


class OpenRun(LiveTracker):
    """A run that wandb keeps open in this process. wandb's step is the round, and may not decrease.

    wandb's history cannot be changed. Rounds that a resumed run repeats are not sent again, because they have the same
    bits.
    Rounds before the checkpoint that wandb lacks are sent again.
    """

    def __init__(self, run: Any, info: RunInfo, rounds_there: int) -> None:
        """Wrap an open run, and send the earlier rounds that wandb lacks.

        Args:
            run: wandb's run.
            info: facts about this run.
            rounds_there: how many rounds wandb has from earlier starts.
        """
        self._run = run
        self._info = info
        self._rounds_there = rounds_there
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        for metrics in _rounds_before(info):
            self.log(metrics)

    def log(self, metrics: Metrics) -> None:
        round_index = int(metrics["round"])
        if round_index >= self._rounds_there:
            self._run.log(metrics, step=round_index, commit=True)

    def show(self, media: Media) -> None:
        if media.round >= self._rounds_there:
            with self._nothing_elsewhere():
                self._run.log(as_wandb_has_it(media), step=media.round, commit=False)

    @contextmanager
    def _nothing_elsewhere(self) -> Iterator[None]:
        """Keep wandb's copies of a table's media in the run's folder.

        By default wandb stages them in the user's home directory, where an offline run would leave them forever.
        """
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

    def start(self, run: RunInfo) -> OpenRun:
        """Open the run: online with a login, offline without one or if the service does not answer.

        Raises:
            ValueError: The service refuses the login or the run.
        """
        import wandb

        identity, (mode, why) = run.tracker_ids.get(NAME) or uuid.uuid4().hex[:8], connection()
        try:
            opened = self._open(run, identity, mode)
        except wandb.Error as error:
            mode, why = "offline", _if_not_reachable(error)
            opened = self._open(run, identity, mode)
        if why:
            later = f"wandb sync {run.folder}/{FOLDER}/offline-run-*"
            print_line(f"tracker wandb: {why}, so the run is kept offline; send it later with: {later}")
        return opened

    def _open(self, run: RunInfo, identity: str, mode: Mode) -> OpenRun:
        """Open the run in one mode."""
        import wandb

        # Send neither terminal output nor code nor git state, which may be confidential.
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_transaction_log_flush_interval=FLUSH_SECONDS
        )
        # Read before opening, which creates a new file.
        rounds_there = rounds_in_files(run.storage.folder(FOLDER), identity) if mode == "offline" else 0
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
            mode=mode,
            settings=settings,
        )
        return OpenRun(opened, run, opened.starting_step if mode == "online" else rounds_there)


def as_wandb_has_it(media: Media) -> dict[str, Any]:
    """Return the media as wandb's objects under `images/<panel>`, `tables/<panel>` and `histograms/<name>`."""
    import wandb

    shown: dict[str, Any] = {}
    for panel, images in media.images.items():
        shown[f"images/{panel}"] = [_shown(image) for image in images]
    for panel, table in media.tables.items():
        rows = [[_shown(cell) if isinstance(cell, CaptionedImage) else cell for cell in row] for row in table.rows]
        shown[f"tables/{panel}"] = wandb.Table(columns=list(table.columns), data=rows)
    for name, values in media.countable.items():
        shown[f"histograms/{name}"] = wandb.Histogram(np_histogram=np.histogram(values, bins=BINS))
    return shown


def _shown(image: CaptionedImage) -> Any:
    """Return an image, or a clip as an mp4 file, which wandb does not encode again."""
    import wandb

    if image.frame_rate is not None:
        return wandb.Video(io.BytesIO(mp4(image.pixels, image.frame_rate)), caption=image.caption or None, format="mp4")
    # For an array wandb would guess whether to rescale its values.
    return wandb.Image(PIL.Image.fromarray(image.pixels), caption=image.caption or None)


def _rounds_before(info: RunInfo) -> Iterator[Metrics]:
    """Yield the metrics of the rounds before this start's first."""
    folder = RunFolder(info.folder)
    logged = (
        read_json_lines(folder.storage, folder.metrics, ("round",)) if folder.storage.exists(folder.metrics) else []
    )
    for metrics in logged:
        if metrics["round"] < info.first_round:
            yield {name: math.nan if value is None else value for name, value in metrics.items()}


def connection() -> tuple[Mode, str]:
    """Return wandb's mode here, and why it is offline if the service does not answer (otherwise an empty text).

    WANDB_MODE decides if it disables the network. Otherwise the run is online if wandb finds a login without asking.

    Raises:
        ValueError: The service refuses the login.
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
    """Describe that wandb's service cannot be reached.

    Raises:
        ValueError: The service can be reached, so that `error` is for the user to fix.
    """
    import wandb

    service = wandb.setup().settings.base_url
    if server_answers(service):
        raise ValueError(
            f"trackers: wandb cannot be used with {service}: {first_line(error)}; correct WANDB_API_KEY, or the "
            "table's project and entity, or export WANDB_MODE=offline"
        ) from error
    return f"{service} does not answer"


HEAD = 7  # bytes of wandb's own file header
BLOCK = 32768
RECORD_HEAD = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def rounds_in_files(folder: Storage, identity: str) -> int:
    """Return how many rounds of the run `identity` are in all its files in wandb's folder.

    Every start has its own file.
    """
    names = [f"{name}/run-{identity}.wandb" for name in folder.names() if name.endswith(f"-{identity}")]
    return max((rounds_in(folder.read(name)) for name in names if folder.exists(name)), default=0)


def rounds_in(data: bytes) -> int:
    """Return one file's last round, plus 1."""
    # The module creates its types at run time.
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    items = (item for record in records(data) for item in Record.FromString(record).history.item)
    found = [json.loads(item.value_json) for item in items if "round" in (item.key, *item.nested_key[:1])]
    return int(max(found, default=-1)) + 1


def records(data: bytes) -> Iterator[bytes]:
    """Yield a file's records, up to an incomplete one."""
    place, record = HEAD, b""
    while True:
        if BLOCK - place % BLOCK < RECORD_HEAD.size:  # a block ends with padding where no record head fits
            place += BLOCK - place % BLOCK
        if place + RECORD_HEAD.size > len(data):
            return
        _, length, kind = RECORD_HEAD.unpack_from(data, place)
        place += RECORD_HEAD.size
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or place + length > len(data):
            return
        part, place = data[place : place + length], place + length
        record = part if kind in (WHOLE, FIRST) else record + part
        if kind in (WHOLE, LAST):
            yield record
