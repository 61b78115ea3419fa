"""The ledger: every image of a round comes back as it was, in an object store too, and a round is whole or absent."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.filesystems import LocalFiles
from ray_ddpo.common.run_storage.ledger import OF_ITS_GROUP, Ledger
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.trajectory import Rollout, Scores, TaskReport, TrainBatch

WEIGHTS = {"beauty": 2.0, "size": -0.5}
ON = Machine(processor="a processor", gpu="A GPU", versions="torch 2.13.0")
SEEDS = ((2**63 - 1, 0), (4, 8))


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.getfixturevalue('bucket')}/runs/one" if request.param == "s3" else tmp_path)


def ledger_in(storage: Storage, **keys: object) -> Ledger:
    return Ledger(storage, RolloutsTable.model_validate(keys))


def sampled(round_index: int = 3, first_reward: float = 1.0) -> tuple[TrainBatch, list[Rollout]]:
    """A round of two tasks of two images; the third could not be scored, and the fourth is of its group."""
    rewards = np.array([first_reward, 3.0, np.nan, 7.0], np.float32)
    rollouts = []
    for index, seeds in enumerate(SEEDS):
        task = Task(round_index, index, round_index - 1, (Prompt("a cat"), Prompt("ein »Fuchs«")), seeds)
        report = TaskReport(task, "weights", 7, 100, 3.0, (f"{index}a", f"{index}b"), f"host/{index}", ON)
        part = rewards[2 * index : 2 * index + 2]
        scores = Scores({"beauty": part, "size": part * 2}, 0.1, machines=frozenset({ON}))
        rollouts.append(Rollout(report, scores, None, None))
    rollouts[1].scores.dropped[0] = "it took too long"
    reports = tuple(rollout.report for rollout in rollouts)
    advantages = np.array([-1.0, 1.0, np.nan, np.nan])
    return TrainBatch(round_index, reports, advantages, (2, 3)), rollouts


def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (2, 8, 8, 3), np.uint8) for _ in range(2)]


def test_a_row_holds_all_that_is_known_of_an_image(storage: Storage) -> None:
    ledger = ledger_in(storage)
    ledger.write_round(*sampled(), WEIGHTS)
    assert storage.names("rollouts") == ["round=000003"]
    table = ledger.read(3)
    assert table.schema.field("seed").type == pa.int64()
    found = table.to_pydict()
    assert found == {
        "round": [3, 3, 3, 3],
        "task": [0, 0, 1, 1],
        "image": [0, 1, 2, 3],
        "prompt": ["a cat", "ein »Fuchs«"] * 2,
        "seed": [2**63 - 1, 0, 4, 8],
        "policy_version": [2] * 4,
        "fingerprint": ["weights"] * 4,
        "image_fingerprint": ["0a", "0b", "1a", "1b"],
        "sampled_by": ["host/0", "host/0", "host/1", "host/1"],
        "sampled_on": ["A GPU, a processor, torch 2.13.0"] * 4,
        "scored_on": ["A GPU, a processor, torch 2.13.0"] * 4,
        "seconds": [1.5] * 4,
        "dropped": [None, None, "it took too long", OF_ITS_GROUP],
        "reward": [1.0, 3.0, None, 7.0],  # 2 × beauty − 0.5 × size, and size is twice beauty
        "advantage": [-1.0, 1.0, None, None],
        "reward/beauty": [1.0, 3.0, None, 7.0],
        "reward/size": [2.0, 6.0, None, 14.0],
    }


def test_writing_a_round_again_replaces_it(storage: Storage) -> None:
    ledger = ledger_in(storage)
    for reward in (1.0, 5.0):
        ledger.write_round(*sampled(first_reward=reward), WEIGHTS)
    assert ledger.read(3).to_pydict()["reward"] == [5.0, 3.0, None, 7.0] and ledger.rounds() == [3]


def test_a_resumed_run_cuts_away_the_rounds_it_does_again(storage: Storage) -> None:
    ledger = ledger_in(storage)
    for round_index in (0, 1, 9, 10, 1000000):
        ledger.write_round(*sampled(round_index), WEIGHTS)
    ledger.cut(9)
    assert ledger.rounds() == [0, 1] and storage.names("rollouts") == ["round=000000", "round=000001"]


def test_a_round_that_is_not_there_is_named_with_those_that_are(storage: Storage) -> None:
    ledger = ledger_in(storage)
    with pytest.raises(ValueError, match="has no round 3: it is empty"):
        ledger.read(3)
    for round_index in (4, 5, 6):
        ledger.write_round(*sampled(round_index), WEIGHTS)
    with pytest.raises(ValueError, match="has no round 3: it has 3 rounds, 4 to 6"):
        ledger.read(3)


def test_pictures_are_kept_where_the_recipe_says_so_and_lose_nothing(storage: Storage) -> None:
    ledger = ledger_in(storage, images_every=3)
    for round_index in (3, 4):
        ledger.write_round(*sampled(round_index), WEIGHTS, images())
    assert ledger.wants_images(0) and ledger.wants_images(3) and not ledger.wants_images(4)
    assert "image" not in ledger.read(4).column_names
    kept = [np.asarray(Image.open(io.BytesIO(png))) for png in ledger.read(3).to_pydict()["image"]]
    assert np.array_equal(np.stack(kept), np.concatenate(images()))


def test_nothing_is_written_where_the_recipe_keeps_no_rollouts(storage: Storage) -> None:
    ledger = ledger_in(storage, keep=False, images_every=1)
    ledger.write_round(*sampled(), WEIGHTS, images())
    assert ledger.rounds() == [] and not ledger.wants_images(0) and not storage.exists("rollouts")


def test_the_whole_ledger_is_read_at_once_by_other_programs(tmp_path: Path) -> None:
    ledger = ledger_in(Storage(tmp_path))
    for round_index in (0, 12):
        ledger.write_round(*sampled(round_index), WEIGHTS)
    table = parquet.read_table(tmp_path / "rollouts")
    assert table.column("round").to_pylist() == [0] * 4 + [12] * 4


@pytest.mark.parametrize("operation", ["put", "sync", "rename"])
def test_a_round_is_whole_or_absent(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_in(Storage(tmp_path))
    ledger.write_round(*sampled(), WEIGHTS)
    before = hashlib.sha256((tmp_path / "rollouts/round=000003/images.parquet").read_bytes()).hexdigest()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(LocalFiles, operation, fail)
    for round_index in (3, 4):
        with pytest.raises(OSError, match="no space"):
            ledger.write_round(*sampled(round_index, first_reward=9.0), WEIGHTS)
    monkeypatch.undo()
    assert ledger.rounds() == [3]
    assert hashlib.sha256((tmp_path / "rollouts/round=000003/images.parquet").read_bytes()).hexdigest() == before


def test_metadata_has_a_column_where_prompts_have_some(storage: Storage) -> None:
    ledger, metadata = ledger_in(storage), {"include": [{"class": "Füchschen", "count": 2}], "score": 0.1 + 0.2}
    batch, rollouts = sampled()
    task = rollouts[0].report.task
    prompts = (Prompt("a cat", metadata), task.prompts[1])
    report = replace(rollouts[0].report, task=replace(task, prompts=prompts))
    ledger.write_round(batch, [replace(rollouts[0], report=report), rollouts[1]], WEIGHTS)
    found = ledger.read(3).to_pydict()["metadata"]
    assert json.loads(found[0]) == metadata and found[1:] == [None] * 3
