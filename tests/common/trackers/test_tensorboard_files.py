"""TensorBoard's event files: what they show, and that a resumed run hides what it does again."""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PagesAccumulator

from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.trackers.media import CaptionedImage, Media, ShownTable
from ray_ddpo.common.trackers.tensorboard_files import TensorboardFiles, markdown
from ray_ddpo.common.trackers.tracker import RunInfo

FOX, JAY = (np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8) for seed in range(2))


def log(folder: Path, first_round: int, losses: dict[int, float], *shown: Media) -> None:
    live = TensorboardFiles().start(RunInfo("run", folder, {}, 10, first_round))
    for round_index, loss in losses.items():
        for media in (each for each in shown if each.round == round_index):
            live.show(media)
        live.log({"round": float(round_index), "loss": loss})
    live.finish()


def events_in(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def text_of(events: EventAccumulator | PagesAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def test_rounds_that_are_done_again_are_shown_once_with_their_new_value(tmp_path: Path) -> None:
    log(tmp_path, 0, {0: 1.0, 1: 2.0, 2: 3.0})
    log(tmp_path, 1, {1: 20.0})
    assert [(event.step, event.value) for event in events_in(tmp_path).Scalars("loss")] == [(0, 1.0), (1, 20.0)]


def test_pictures_captions_tables_and_histograms_are_shown_at_their_round(tmp_path: Path) -> None:
    images = (CaptionedImage(FOX, "a red fox: reward 1.5"), CaptionedImage(JAY, "a | blue <jay>\n"))
    table = ShownTable(("prompt", "image", "reward"), (("a red fox", CaptionedImage(FOX), 1.23456),))
    values = {"reward": np.array([1.0, 2.0, 2.0, 9.0, np.nan]), "none": np.empty(0)}
    log(tmp_path, 0, {2: 1.0, 3: 1.0}, Media(3, {"round": images}, {"round": table}, values))
    events = events_in(tmp_path)
    for place, pixels in enumerate((FOX, JAY)):
        (image,) = events.Images(f"images/round/{place:02d}")
        assert image.step == 3 and np.array_equal(from_png(image.encoded_image_string), pixels)
    (captions,) = text_of(events, "captions/round")
    assert captions.splitlines()[2:] == ["| 00 | a red fox: reward 1.5 |", "| 01 | a &#124; blue &lt;jay&gt; |"]
    assert text_of(events, "tables/round") == ["| prompt | reward |\n| --- | --- |\n| a red fox | 1.235 |"]
    (histogram,) = events.Histograms("histograms/reward")
    shown = histogram.histogram_value
    assert (histogram.step, shown.num, shown.sum, shown.min, shown.max) == (3, 4, 14.0, 1.0, 9.0)
    assert sum(shown.bucket) == 4 and max(shown.bucket) == 2
    assert events.Tags()["histograms"] == ["histograms/reward"]


def test_what_is_shown_again_after_a_resume_hides_what_was_shown_before(tmp_path: Path) -> None:
    def shown(round_index: int, pixels: np.ndarray, values: list[float]) -> Media:
        return Media(round_index, {"round": (CaptionedImage(pixels, str(values)),)}, {}, {"reward": np.array(values)})

    log(tmp_path, 0, {0: 1.0, 1: 2.0, 2: 3.0}, shown(0, FOX, [1.0]), shown(2, FOX, [2.0]))
    log(tmp_path, 1, {1: 2.0, 2: 3.0}, shown(2, JAY, [4.0, 4.0]))
    events = events_in(tmp_path)
    images = [(event.step, from_png(event.encoded_image_string)) for event in events.Images("images/round/00")]
    assert [step for step, _ in images] == [0, 2] and np.array_equal(images[1][1], JAY)
    assert [event.histogram_value.num for event in events.Histograms("histograms/reward")] == [1, 2]
    as_pages_have_it = PagesAccumulator(str(tmp_path / "tensorboard"))
    as_pages_have_it.Reload()
    assert [text.splitlines()[2] for text in text_of(as_pages_have_it, "captions/round")] == [
        "| 00 | [1.0] |",
        "| 00 | [4.0, 4.0] |",
    ]


def test_a_table_of_nothing_has_its_head() -> None:
    assert markdown(ShownTable(("prompt", "images"), ())) == "| prompt | images |\n| --- | --- |"
