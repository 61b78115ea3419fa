"""Files of the real wandb, offline: images, tables and histograms, and one history over kills and resumes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.trackers.media import CaptionedImage, Media, ShownTable
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.common.trackers.wandb_run import WandbRun, records, rounds_in, rounds_in_files
from tests.wandb_history import history, pixels_of, starts, tables_of

IDENTITY = {"wandb": "a1b2c3d4"}
FOX, JAY = (np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8) for seed in range(2))
NEARLY_BLACK = np.ones((8, 12, 3), np.uint8)  # an array's ones might be taken for white


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def log(folder: Path, first_round: int, losses: dict[int, float], *shown: Media) -> None:
    """Run one start. As in a run, the metrics before its first round are in metrics.jsonl."""
    live = WandbRun().start(RunInfo("tiny", folder, {}, 10, first_round, IDENTITY))
    for round_index, loss in losses.items():
        for media in (each for each in shown if each.round == round_index):
            live.show(media)
        live.log({"round": float(round_index), "loss": loss})
    live.finish()


def losses_in(folder: Path) -> list[tuple[int, int, float]]:
    return [(row["_step"], row["round"], row["loss"]) for row in history(folder)]


@pytest.mark.rotated(every=2, group="longest")
def test_images_tables_and_histograms_are_in_the_row_of_their_round(tmp_path: Path) -> None:
    images = (CaptionedImage(FOX, "a red fox: reward 1.5"), CaptionedImage(NEARLY_BLACK, "night"))
    rows = (("a red fox", 7, CaptionedImage(JAY), 1.5), ("night", 8, CaptionedImage(NEARLY_BLACK), float("nan")))
    table = ShownTable(("prompt", "seed", "image", "reward"), rows)
    values = np.array([1.0, 2.0, 2.0, 9.0, np.inf])
    media = Media(1, {"round": images}, {"round": table}, {"reward": values, "none": np.array([np.nan])})
    log(tmp_path, 0, {0: 5.0, 1: 4.0, 2: 3.0}, media, Media(1, {"evaluation": images[:1]}))
    before, row, after = history(tmp_path)
    assert (row["_step"], row["round"], row["loss"]) == (1, 1, 4.0)
    assert row["images/round/captions"] == ["a red fox: reward 1.5", "night"]
    fox, night = (pixels_of(tmp_path, name) for name in row["images/round/filenames"])
    assert np.array_equal(fox, FOX) and np.array_equal(night, NEARLY_BLACK)
    assert row["images/evaluation/count"] == 1
    (shown,) = tables_of(tmp_path, "tables/round")
    assert shown["columns"] == ["prompt", "seed", "image", "reward"] and len(shown["data"]) == 2
    prompt, seed, image, reward = shown["data"][0]
    assert (prompt, seed, reward) == ("a red fox", 7, 1.5)
    assert np.array_equal(pixels_of(tmp_path, image["path"]), JAY) and image["path"].startswith(str(tmp_path))
    assert row["tables/round/nrows"] == 2 and "WANDB_DATA_DIR" not in os.environ
    counts, edges = np.array(row["histograms/reward/values"]), row["histograms/reward/bins"]
    assert counts.sum() == 4 and counts.max() == 2 and (edges[0], edges[-1]) == (1.0, 9.0)
    assert not any(name.startswith(("images", "tables", "histograms")) for name in before | after)
    assert "histograms/none/values" not in row


def test_rounds_that_a_resumed_run_does_again_stand_in_the_history_once(tmp_path: Path) -> None:
    log(tmp_path, 0, {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}, Media(3, {"round": (CaptionedImage(FOX),)}))
    log(tmp_path, 2, {2: 3.0, 3: 2.0, 4: 1.0}, Media(3, {"round": (CaptionedImage(FOX),)}))
    assert losses_in(tmp_path) == [(0, 0, 5.0), (1, 1, 4.0), (2, 2, 3.0), (3, 3, 2.0), (4, 4, 1.0)]
    assert [row["round"] for row in history(tmp_path) if "images/round/count" in row] == [3]
    assert {file.name for file in starts(tmp_path)} == {"run-a1b2c3d4.wandb"} and len(starts(tmp_path)) == 2


def test_what_a_kill_has_lost_is_taken_from_the_metrics(tmp_path: Path) -> None:
    log(tmp_path, 0, {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0})
    (file,) = starts(tmp_path)
    whole = file.read_bytes()
    ends = np.cumsum([len(data) + 7 for data in records(whole)]) + 7
    (cut,) = [end for end in ends if rounds_in(whole[:end]) == 2][:1]  # two rounds are out
    file.write_bytes(whole[: cut + 20])
    metrics = [{"round": float(round_index), "loss": 5.0 - round_index} for round_index in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    log(tmp_path, 3, {3: 2.0, 4: 1.0})
    assert losses_in(tmp_path) == [(0, 0, 5.0), (1, 1, 4.0), (2, 2, 3.0), (3, 3, 2.0), (4, 4, 1.0)]


def test_a_file_is_read_over_its_blocks_and_wherever_it_is_cut_off(tmp_path: Path) -> None:
    live = WandbRun().start(RunInfo("tiny", tmp_path, {"long": "0123456789" * 8000}, 10, 0, IDENTITY))
    for round_index in range(300):
        live.log({"round": float(round_index), **{f"reward/prompt/animal {number}": 0.5 for number in range(20)}})
    live.finish()
    (file,) = starts(tmp_path)
    data = file.read_bytes()
    assert rounds_in(data) == rounds_in_files(Storage(tmp_path / "wandb"), "a1b2c3d4") == 300 and len(data) > 200_000
    assert rounds_in_files(Storage(tmp_path / "wandb"), "another0") == 0
    found = [rounds_in(data[:length]) for length in range(0, len(data), 29_989)]
    assert found == sorted(found) and found[0] == 0 < found[-2] < 300
