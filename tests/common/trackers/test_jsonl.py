"""metrics.jsonl: one object a round, on disk at once, and cut back when a run is resumed."""

import json
from pathlib import Path

import pytest

from common.trackers.jsonl import Jsonl
from common.trackers.tracker import RunInfo


def start(folder: Path, first_round: int = 0):
    return Jsonl().start(RunInfo("run", folder, {}, 10, first_round))


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rounds(folder: Path, count: int) -> None:
    live = start(folder)
    for round in range(count):
        live.log({"round": float(round), "loss": round / 4})
    live.finish()


def test_a_round_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    live = start(tmp_path)
    live.log({"round": 0.0, "reward/mean": -1.5})
    assert logged(tmp_path) == [{"round": 0, "reward/mean": -1.5}]


def test_a_resumed_run_cuts_away_the_rounds_it_does_again(tmp_path: Path) -> None:
    write_rounds(tmp_path, 5)
    live = start(tmp_path, first_round=3)
    assert [line["round"] for line in logged(tmp_path)] == [0, 1, 2]
    live.log({"round": 3.0, "loss": 9.0})
    assert [(line["round"], line["loss"]) for line in logged(tmp_path)] == [(0, 0), (1, 0.25), (2, 0.5), (3, 9)]


def test_a_run_that_begins_anew_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    write_rounds(tmp_path, 3)
    start(tmp_path, first_round=0).finish()
    assert logged(tmp_path) == []


def test_a_line_that_a_killed_process_left_unfinished_is_cut_away(tmp_path: Path) -> None:
    write_rounds(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2.0, "rew')
    start(tmp_path, first_round=2).log({"round": 2.0})
    assert [line["round"] for line in logged(tmp_path)] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_named_and_the_file_is_left_alone(tmp_path: Path) -> None:
    damaged = '{"round": 0.0}\nnot json\n{"round": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(damaged)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is 'not json'"):
        start(tmp_path, first_round=3)
    assert (tmp_path / "metrics.jsonl").read_text() == damaged


def test_what_is_not_finite_is_null_because_json_has_no_nan(tmp_path: Path) -> None:
    live = start(tmp_path)
    live.log({"round": 0.0, "loss": float("nan"), "grad_norm": float("inf"), "kl_nats": 0.5})
    assert logged(tmp_path) == [{"round": 0, "loss": None, "grad_norm": None, "kl_nats": 0.5}]
