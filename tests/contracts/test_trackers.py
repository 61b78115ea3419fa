"""The contract of every tracker in the registry."""

import dataclasses
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.media import CaptionedImage, Media, ShownTable
from ray_ddpo.common.trackers.tracker import Metrics, RunInfo

# A metric may be missing in some rounds, such as an evaluation's, or not be finite.
ROUNDS: list[Metrics] = [
    {"round": 0.0, "reward/mean": 1.5, "images_per_second": 2.0, "grad_norm": float("nan")},
    {"round": 1.0, "reward/mean": 2.25, "images_per_second": 2.0, "evaluation/jpeg/mean": 7.0},
    {"round": 2.0, "reward/mean": -3.0, "images_per_second": 2.0},
]
REWARD_MEANS = {0: 1.5, 1: 2.25, 2: -3.0}
RED, BLUE = (np.full((8, 12, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
MEDIA = Media(
    1,
    images={"evaluation": (CaptionedImage(RED, "a red fox, 1.5"), CaptionedImage(BLUE, "a | blue <jay>"))},
    tables={
        "evaluation": ShownTable(("prompt", "seed", "image", "reward"), (("a red fox", 7, CaptionedImage(RED), 1.5),))
    },
    histograms={"reward": np.array([1.0, 2.0, 2.0, 9.0])},
)


def from_jsonl(folder: Path, printed: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["round"]: line["reward/mean"] for line in lines}


def from_terminal(folder: Path, printed: str) -> dict[int, float]:
    lines = [line.split() for line in printed.splitlines() if line.startswith("round ")]
    return {int(words[1].split("/")[0]) - 1: float(words[3]) for words in lines}


def from_tensorboard(folder: Path, printed: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("reward/mean")}


def from_wandb(folder: Path, printed: str) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, found = file.read_bytes(), 7, {}  # LevelDB's log format, after seven bytes of wandb's own
    while place + 7 < len(data):
        _, size, _ = struct.unpack("<IHB", data[place : place + 7])
        record = Record.FromString(data[place + 7 : place + 7 + size])
        place += 7 + size
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "reward/mean" in items:
            found[int(items["round"])] = items["reward/mean"]
    return found


READ_BACK: dict[str, Callable[[Path, str], dict[int, float]]] = {
    "jsonl": from_jsonl,
    "terminal": from_terminal,
    "tensorboard": from_tensorboard,
    "wandb": from_wandb,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def test_every_tracker_is_read_back() -> None:
    # Ray shows a round's values only on a cluster, until the next round: see tests/system/test_ray_metrics.py.
    assert {*READ_BACK, "ray"} == {*TRACKERS}


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("name", READ_BACK)
def test_what_was_logged_can_be_read_back(
    name: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = build(TRACKERS, {"name": name}, "trackers.0")
    tracker.check()
    folder = tmp_path / "not_there_yet"
    live = tracker.start(RunInfo("tiny", folder, recipe.model_dump(), 3, 0))
    for metrics in ROUNDS:
        live.log(metrics)
    live.finish()
    assert READ_BACK[name](folder, capsys.readouterr().out) == REWARD_MEANS


@pytest.mark.parametrize("name", READ_BACK)
def test_metrics_of_a_run_in_an_object_store_are_there_and_not_here(
    name: str,
    recipe: Recipe,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    live = build(TRACKERS, {"name": name}, "trackers.0").start(
        RunInfo("tiny", f"{bucket}/tiny", recipe.model_dump(), 3, 0)
    )
    for metrics in ROUNDS:
        live.log(metrics)
    live.finish()
    Storage(f"{bucket}/tiny").copy_out("", tmp_path / "back")
    assert READ_BACK[name](tmp_path / "back", capsys.readouterr().out) == REWARD_MEANS
    assert [path for path in (tmp_path / "scratch").glob("ddpo-*")] == []


@pytest.mark.parametrize("name", TRACKERS)
def test_logging_leaves_the_metrics_as_they_were(name: str, recipe: Recipe, tmp_path: Path) -> None:
    live = build(TRACKERS, {"name": name}, "trackers.0").start(RunInfo("tiny", tmp_path, recipe.model_dump(), 3, 0))
    metrics = dict(ROUNDS[1])
    live.log(metrics)
    live.finish()
    assert metrics == ROUNDS[1]


@pytest.mark.parametrize("name", READ_BACK)
def test_media_before_a_rounds_metrics_do_not_change_these(
    name: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = build(TRACKERS, {"name": name}, "trackers.0").start(RunInfo("tiny", tmp_path, recipe.model_dump(), 3, 0))
    for metrics in ROUNDS:
        live.show(dataclasses.replace(MEDIA, round=int(metrics["round"])))
        live.log(metrics)
    live.finish()
    assert READ_BACK[name](tmp_path, capsys.readouterr().out) == REWARD_MEANS


@pytest.mark.parametrize("name", TRACKERS)
def test_an_unknown_key_is_named_with_its_place_in_the_recipe(name: str) -> None:
    with pytest.raises(ValueError, match=r"trackers\.0\.colour is not a key that is known: the keys here are \["):
        build(TRACKERS, {"name": name, "colour": "red"}, "trackers.0")
