"""Metrics as TensorBoard event files, in the run's folder `tensorboard`."""

import html
from typing import Any, ClassVar

from ray_ddpo.common.trackers.media import CaptionedImage, Cell, Media, ShownTable
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker
from ray_ddpo.common.video_files import gif, playable

FOLDER = "tensorboard"


def markdown(table: ShownTable) -> str:
    """Return a table as TensorBoard's text panel shows it.

    Columns of images are left out, because text has no images.
    """
    shown = [
        column
        for column in range(len(table.columns))
        if not any(isinstance(row[column], CaptionedImage) for row in table.rows)
    ]
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_text(row[column]) for column in shown) + " |" for row in rows)


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return html.escape(" ".join(str(cell).split())).replace("|", "&#124;")


class EventFiles(LiveTracker):
    """An open TensorBoard writer."""

    def __init__(self, writer: Any, run: RunInfo) -> None:
        self._writer = writer
        self._run = run

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=int(metrics["round"]))
        self._writer.flush()

    def show(self, media: Media) -> None:
        """Add images and clips with their captions, tables and histograms."""
        step = media.round
        for panel, images in media.images.items():
            for number, image in enumerate(images):
                self._add(f"images/{panel}/{number:02d}", image, step)
            rows = tuple((f"{number:02d}", image.caption) for number, image in enumerate(images))
            captions = ShownTable(("image", "caption"), rows)
            self._writer.add_text(f"captions/{panel}", markdown(captions), global_step=step)
        for panel, table in media.tables.items():
            self._writer.add_text(f"tables/{panel}", markdown(table), global_step=step)
        for name, values in media.countable.items():
            self._writer.add_histogram(f"histograms/{name}", values, global_step=step)

    def _add(self, tag: str, image: CaptionedImage, step: int) -> None:
        """Add an image, or a clip as an animated GIF, as `add_video` does with moviepy."""
        if image.frame_rate is None:
            self._writer.add_image(tag, image.pixels, global_step=step, dataformats="HWC")
            return
        # The module creates its types at run time.
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        clip = playable(image.pixels)
        height, width = clip.shape[1:3]
        data = gif(clip, image.frame_rate)
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)

    def finish(self) -> None:
        self._writer.close()
        self._run.move_up(FOLDER)


class TensorboardFiles(Tracker):
    """TensorBoard event files in the run's folder. It has no keys."""

    required_packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def start(self, run: RunInfo) -> EventFiles:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides an earlier start's values of rounds that a resumed run does again.
        return EventFiles(SummaryWriter(run.local_folder / FOLDER, purge_step=run.first_round), run)
