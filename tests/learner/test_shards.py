"""Checkpoints in shards: the same bits, a missing shard is noticed, and memory is that of one shard."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from ray_ddpo.learner.checkpoints.learner_state import EvaluationState, EvalVersion, LearnerState
from ray_ddpo.learner.checkpoints.shards import Shards, cut, grouped, read_arrays, read_buffer, shard_names

ROOT = Path(__file__).parents[2]


def whole_network(rounds_done: int = 3) -> Checkpoint:
    """Return a state with weights of 1,000 numbers, their average, and optimizer state of several dtypes."""
    generator = np.random.default_rng(rounds_done)
    weights = pack(rounds_done, {"a": generator.normal(size=(20, 30)), "b": generator.normal(size=400)})
    average = pack(rounds_done, {"a": np.ones((20, 30)), "b": np.zeros(400)})
    optimizer = {
        "a/state1": generator.integers(0, 256, (20, 30), np.uint8),
        "a/absmax1": generator.normal(size=3).astype(np.float32),
        "a/step": np.array(7),
        "b/exp_avg": generator.normal(size=400).astype(np.float32),
        "b/exp_avg_sq": generator.normal(size=400).astype(np.float32),
    }
    state = LearnerState(rounds_done, (weights,), optimizer, {}, average)
    evaluation = EvaluationState(average, (EvalVersion(weights, average),))
    return Checkpoint(rounds_done, state, {"joined": {"a cat": (1.0,)}}, evaluation=evaluation)


def of(shards: Shards) -> list[list[str]]:
    return [list(part) for part in shards.parts]


def test_a_file_within_the_limit_keeps_its_name_and_a_larger_one_is_numbered() -> None:
    assert shard_names("optimizer.safetensors", 1) == ["optimizer.safetensors"]
    assert shard_names("optimizer.safetensors", 2) == [
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    ("numbers", "limit", "sizes"), [(10, 40, [10]), (10, 16, [4, 4, 2]), (0, 16, [0]), (2, 1, [1, 1])]
)
def test_a_buffer_is_cut_by_bytes(numbers: int, limit: int, sizes: list[int], tmp_path: Path) -> None:
    buffer, folder = np.arange(numbers, dtype=np.float32), Storage(tmp_path)
    shards = cut("w.safetensors", buffer, limit)
    assert [len(part["buffer"]) for part in shards.parts] == sizes
    assert all(np.shares_memory(part["buffer"], buffer) for part in shards.parts if numbers)
    for name, data in shards.files():
        folder.write(name, data)
    assert np.array_equal(read_buffer(folder, "w.safetensors", len(sizes), numbers), buffer)


def test_arrays_are_grouped_in_order_and_a_too_large_one_is_alone(tmp_path: Path) -> None:
    sizes, folder = {"a": 2, "b": 2, "c": 9, "d": 1, "e": 3}, Storage(tmp_path)
    arrays = {name: np.full(size, size, np.float32) for name, size in sizes.items()}
    shards = grouped("o.safetensors", arrays, 16)
    assert of(shards) == [["a", "b"], ["c"], ["d", "e"]]
    assert of(grouped("o.safetensors", arrays, 1000)) == [list(sizes)] and of(grouped("o", {}, 16)) == [[]]
    for name, data in shards.files():
        folder.write(name, data)
    back = read_arrays(folder, "o.safetensors", 3)
    assert back.keys() == arrays.keys() and all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_shards_that_hold_another_number_than_expected_are_refused(tmp_path: Path) -> None:
    folder = Storage(tmp_path)
    for name, data in cut("w.safetensors", np.zeros(10, np.float32), 16).files():
        folder.write(name, data)
    for size, text in ((9, "does not fit a buffer of 9"), (11, "hold 10 numbers, and 11 are expected")):
        with pytest.raises(ValueError, match=text):
            read_buffer(folder, "w.safetensors", 3, size)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.thorough)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.getfixturevalue('bucket')}/checkpoints" if request.param == "s3" else tmp_path)


def test_everything_comes_back_from_shards_to_the_last_bit(folder: Storage) -> None:
    before = whole_network()
    saved = save_checkpoint(folder, before, keep=1, shard_bytes=1000)
    assert len([name for name in saved.names() if name.startswith("weights-000003-")]) == 4  # of 4,000 bytes
    assert set(json.loads(saved.read(MANIFEST))) == set(saved.names()) - {MANIFEST}
    assert newest_checkpoint(folder) is not None
    after = load_checkpoint(saved)
    assert (
        after.learner.trained.fingerprint == before.learner.trained.fingerprint != after.learner.weights[0].fingerprint
    )
    assert np.array_equal(after.learner.weights[0].buffer, before.learner.weights[0].buffer)
    assert after.evaluation.average is not None and after.evaluation.pending[0].average is not None
    assert after.evaluation.pending[0].current.fingerprint == before.learner.weights[0].fingerprint
    assert after.learner.optimizer.keys() == before.learner.optimizer.keys()
    for name, value in before.learner.optimizer.items():
        back = after.learner.optimizer[name]
        assert back.dtype == value.dtype and back.shape == value.shape and np.array_equal(back, value), name


def test_under_the_limit_files_and_state_are_as_if_there_were_none(tmp_path: Path) -> None:
    saved = save_checkpoint(
        Storage(tmp_path), dataclasses.replace(whole_network(), evaluation=EvaluationState()), keep=1
    )
    weights = ["weights-000003.safetensors", "weights-trained.safetensors"]
    assert saved.names() == [MANIFEST, "optimizer.safetensors", "state.json", *weights]
    assert "shards" not in json.loads(saved.read("state.json"))


@pytest.mark.parametrize("name", ["weights-000002-00003-of-00004.safetensors", "optimizer-00002-of-00003.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "cut off", "gone"])
def test_one_with_a_shard_changed_cut_off_or_gone_is_passed_over(name: str, damage: str, folder: Storage) -> None:
    older = save_checkpoint(folder, whole_network(1), keep=5, shard_bytes=1000)
    newest = save_checkpoint(folder, whole_network(2), keep=5, shard_bytes=1000)
    data = newest.read(name)
    if damage == "gone":
        newest.remove(name)
    else:
        newest.write(name, data[:-1] + b"x" if damage == "changed" else data[: len(data) // 2])
    found = newest_checkpoint(folder)
    assert found is not None and found.name == older.name


@pytest.mark.parametrize("count", [0, -1, 10**12, "many", 2.5])
def test_a_state_that_names_an_impossible_number_of_shards_is_refused(count: object, tmp_path: Path) -> None:
    saved = save_checkpoint(Storage(tmp_path), whole_network(), keep=1)
    state = json.loads(saved.read("state.json")) | {"shards": {"optimizer.safetensors": count}}
    saved.write("state.json", json.dumps(state).encode())
    with pytest.raises(ValueError, match="optimizer.safetensors has .* shards"):
        load_checkpoint(saved)


MEGABYTE = 2**20
MEMORY = """
import sys
import numpy as np
from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState

def peak():  # of this program alone: what getrusage says begins with the parent's
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder, shard_bytes = Storage(sys.argv[1]), int(sys.argv[2])
numbers = np.random.default_rng(0).standard_normal(16 * 2**20, np.float32)
state = LearnerState(1, (pack(1, {"a": numbers}),), {f"a/{part}": numbers[part::4].copy() for part in range(4)}, {})
small = LearnerState(1, (pack(1, {"a": np.ones(1)}),), {}, {})
save_checkpoint(folder.folder("small"), Checkpoint(1, small, {}), 1)
before = peak()
saved = save_checkpoint(folder, Checkpoint(1, state, {}), 1, shard_bytes)
print(peak() - before)
"""


def beyond_the_state(folder: Path, shard_bytes: int) -> float:
    """Return the peak bytes of saving a state of 128 MB, in a separate process."""
    command = [sys.executable, "-c", MEMORY, str(folder), str(shard_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.thorough
def test_saving_takes_the_memory_of_a_shard_or_two_and_not_of_the_full_state(tmp_path: Path) -> None:
    sharded = beyond_the_state(tmp_path / "sharded", 4 * MEGABYTE)
    whole = beyond_the_state(tmp_path / "whole", 1024 * MEGABYTE)
    print(
        f"beside a state of 128 MiB: {sharded / MEGABYTE:.0f} MiB in shards of 4 MiB, {whole / MEGABYTE:.0f} in one "
        "file"
    )
    # The optimizer's arrays have 16 MiB each: none is cut, and one is in memory as bytes and as a file.
    assert sharded < 40 * MEGABYTE < whole
