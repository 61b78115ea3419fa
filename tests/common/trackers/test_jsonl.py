"""metrics.jsonl: one object a round, on disk at once, and cut back when a run is resumed."""

import json
from pathlib import Path

import pytest

from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.trackers.jsonl import Jsonl
from ray_ddpo.common.trackers.tracker import RunInfo


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.getfixturevalue('bucket')}/runs/one" if request.param == "s3" else tmp_path)


def start(folder: Storage, first_round: int = 0):
    return Jsonl().start(RunInfo("run", folder.location, {}, 10, first_round))


def logged(folder: Storage) -> list[dict]:
    return [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]


def write_rounds(folder: Storage, count: int) -> None:
    live = start(folder)
    for round_index in range(count):
        live.log({"round": float(round_index), "loss": round_index / 4})
    live.finish()


def test_a_round_is_on_disk_as_soon_as_it_is_logged(folder: Storage) -> None:
    live = start(folder)
    live.log({"round": 0.0, "reward/mean": -1.5})
    assert logged(folder) == [{"round": 0, "reward/mean": -1.5}]


def test_a_resumed_run_cuts_away_the_rounds_it_does_again(folder: Storage) -> None:
    write_rounds(folder, 5)
    live = start(folder, first_round=3)
    assert [line["round"] for line in logged(folder)] == [0, 1, 2]
    live.log({"round": 3.0, "loss": 9.0})
    assert [(line["round"], line["loss"]) for line in logged(folder)] == [(0, 0), (1, 0.25), (2, 0.5), (3, 9)]


def test_a_run_that_begins_anew_leaves_nothing_of_the_old_one(folder: Storage) -> None:
    write_rounds(folder, 3)
    start(folder, first_round=0).finish()
    assert logged(folder) == []


def test_a_line_that_a_killed_process_left_unfinished_is_cut_away(folder: Storage) -> None:
    write_rounds(folder, 2)
    folder.append("metrics.jsonl", b'{"round": 2.0, "rew')
    start(folder, first_round=2).log({"round": 2.0})
    assert [line["round"] for line in logged(folder)] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_named_and_the_file_is_left_alone(folder: Storage) -> None:
    damaged = b'{"round": 0.0}\nnot json\n{"round": 2.0}\n'
    folder.write("metrics.jsonl", damaged)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is 'not json'"):
        start(folder, first_round=3)
    assert folder.read("metrics.jsonl") == damaged


def test_what_is_not_finite_is_null_because_json_has_no_nan(folder: Storage) -> None:
    live = start(folder)
    live.log({"round": 0.0, "loss": float("nan"), "grad_norm": float("inf"), "kl_nats": 0.5})
    assert logged(folder) == [{"round": 0, "loss": None, "grad_norm": None, "kl_nats": 0.5}]
