"""Checkpoints: everything is restored, damaged ones are skipped, nothing is unpickled."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints import checkpoint as module
from ray_ddpo.learner.checkpoints.checkpoint import (
    MANIFEST,
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from ray_ddpo.learner.checkpoints.learner_state import EvaluationState, EvalVersion, LearnerState
from tests.accepted_page import assert_refused

MACHINE = Machine(processor="a processor", versions="torch 2.13.0")


def checkpoint(rounds_done: int = 3) -> Checkpoint:
    generator = np.random.default_rng(rounds_done)
    weights = tuple(
        pack(version, {"a.lora_A": generator.normal(size=(2, 3)), "a.lora_B": generator.normal(size=(3, 2))})
        for version in (rounds_done - 1, rounds_done)
    )
    optimizer = {
        "a.lora_A/exp_avg": generator.normal(size=(2, 3)).astype(np.float32),
        "a.lora_A/step": np.array(12.0, np.float32),
    }
    scaler = {"scale": 65536.0, "growth_interval": 2000}
    state = LearnerState(rounds_done, weights, optimizer, scaler, micro_batch_size=6, machine=MACHINE, recomputes=True)
    statistics = {"joined": {"a cat": (1 / 3, -2.5e-17, float(np.float32(0.1))), 'a "dog" é': (7.0,)}}
    return Checkpoint(rounds_done, state, statistics, {"wandb": "abc123"}, rounds_done, {0: [3, 4], 2: [0]})


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"{request.getfixturevalue('bucket')}/checkpoints" if request.param == "s3" else tmp_path)


def test_everything_comes_back_to_the_last_bit(folder: Storage) -> None:
    before = checkpoint()
    after = load_checkpoint(save_checkpoint(folder, before, keep=2))
    assert after.rounds_done == before.rounds_done and after.statistics == before.statistics
    assert after.tracker_ids == before.tracker_ids and after.ledger_rounds == before.ledger_rounds
    assert after.dropped == before.dropped
    assert after.learner.policy_version == before.learner.policy_version
    assert after.learner.scaler == before.learner.scaler and after.learner.micro_batch_size == 6
    assert after.learner.machine == MACHINE
    assert type(after.learner.scaler["growth_interval"]) is int  # torch takes no other
    assert after.learner.optimizer.keys() == before.learner.optimizer.keys()
    for name, value in before.learner.optimizer.items():
        back = after.learner.optimizer[name]
        assert back.dtype == value.dtype and back.shape == value.shape and np.array_equal(back, value), name
    for old, new in zip(before.learner.weights, after.learner.weights, strict=True):
        assert new.policy_version == old.policy_version and new.fingerprint == old.fingerprint
        assert new.manifest == old.manifest and np.array_equal(new.buffer, old.buffer)


def test_files_are_json_and_safetensors_and_nothing_else(folder: Storage) -> None:
    path = save_checkpoint(folder, checkpoint(), keep=2)
    names = set(path.names())
    weights = {"weights-000002.safetensors", "weights-000003.safetensors"}
    assert names == {MANIFEST, "state.json", "optimizer.safetensors", *weights}
    json.loads(path.read("state.json"))
    assert {"pickle", "torch"}.isdisjoint(vars(module))


def test_only_the_newest_are_kept_and_latest_names_the_last(folder: Storage) -> None:
    for rounds_done in (1, 2, 10):
        save_checkpoint(folder, checkpoint(rounds_done), keep=2)
    assert folder.names() == ["latest", "round-000002", "round-000010"]
    assert folder.read("latest") == b"round-000010"
    assert newest_name(folder) == "round-000010"


def test_without_a_checkpoint_there_is_none(folder: Storage) -> None:
    assert newest_checkpoint(folder.folder("not there")) is None


def test_one_without_a_manifest_was_never_committed(folder: Storage) -> None:
    older = save_checkpoint(folder, checkpoint(1), keep=5)
    save_checkpoint(folder, checkpoint(2), keep=5).remove(MANIFEST)
    assert newest_name(folder) == older.name


@pytest.mark.rotated(every=7)
@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "weights-000002.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", ["changed", "cut off", "emptied", "gone"])
def test_one_with_a_file_changed_cut_off_or_gone_is_passed_over(name: str, damage: str, folder: Storage) -> None:
    older = save_checkpoint(folder, checkpoint(1), keep=5)
    newest = save_checkpoint(folder, checkpoint(2), keep=5)
    data = newest.read(name)
    if damage == "gone":
        newest.remove(name)
    else:
        newest.write(name, {"changed": data[:-1] + b"x", "cut off": data[: len(data) // 2], "emptied": b""}[damage])
    assert newest_name(folder) == older.name


def newest_name(folder: Storage) -> str | None:
    newest = newest_checkpoint(folder)
    return newest.name if newest else None


def test_saving_a_round_again_replaces_what_was_there(folder: Storage) -> None:
    for cow in (1.0, 2.0, 3.0):
        again = dataclasses.replace(checkpoint(2), statistics={"joined": {"a cow": (cow,)}})
        saved = save_checkpoint(folder, again, keep=2)
        newest = newest_checkpoint(folder)
        assert newest is not None and newest.location == saved.location
        assert load_checkpoint(newest).statistics == {"joined": {"a cow": (cow,)}}
    assert len([name for name in folder.names() if name.startswith("round-")]) == 1


def test_a_damaged_one_ahead_does_not_push_out_the_one_just_saved(folder: Storage) -> None:
    save_checkpoint(folder, checkpoint(1), keep=2)
    save_checkpoint(folder, checkpoint(9), keep=2).write("state.json", b"{}")
    saved = save_checkpoint(folder, checkpoint(5), keep=1)
    newest = newest_checkpoint(folder)
    assert newest is not None and newest.location == saved.location
    assert folder.names() == ["latest", "round-000005"]


def test_one_saved_without_the_newer_keys_is_read(folder: Storage) -> None:
    saved = save_checkpoint(folder, checkpoint(2), keep=2)
    state = json.loads(saved.read("state.json"))
    for key in ("tracker_ids", "ledger_rounds", "dropped"):
        del state[key]
    saved.write("state.json", json.dumps(state).encode())
    found = load_checkpoint(saved)
    assert (found.tracker_ids, found.ledger_rounds, found.dropped) == ({}, 0, {}) and found.rounds_done == 2


def test_weights_that_are_not_what_they_were_saved_as_are_refused(folder: Storage) -> None:
    path = save_checkpoint(folder, checkpoint(2), keep=2)
    state = json.loads(path.read("state.json"))
    state["weights"][1]["fingerprint"] = "0" * 64
    path.write("state.json", json.dumps(state).encode())
    with pytest.raises(
        ValueError, match=r"weights-000002.safetensors holds other weights of version 2 than were saved"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize("file", ["weights-000002.safetensors", "optimizer.safetensors"])
def test_a_nan_in_a_file_is_reported_with_its_tensor(tmp_path: Path, file: str) -> None:
    path = save_checkpoint(Storage(tmp_path), checkpoint(2), keep=2)
    arrays = {name: array.copy() for name, array in load(path.read(file)).items()}
    name = "buffer" if file.startswith("weights") else "a.lora_A/exp_avg"
    arrays[name].flat[-1] = np.nan
    path.write(file, save(arrays))
    manifest = json.loads(path.read(MANIFEST)) | {file: hashlib.sha256(path.read(file)).hexdigest()}
    path.write(MANIFEST, json.dumps(manifest).encode())
    newest = newest_checkpoint(Storage(tmp_path))
    assert newest is not None
    with pytest.raises(ValueError) as error:
        load_checkpoint(newest)
    assert f"{path.location}/{file}: the tensor {'a.lora_B' if name == 'buffer' else name} holds" in str(error.value)
    assert_refused("weights in a file that are NaN or infinite", str(error.value))


def test_a_nan_among_the_last_rewards_of_a_prompt_is_said_of_the_prompt(tmp_path: Path) -> None:
    path = save_checkpoint(Storage(tmp_path), checkpoint(2), keep=2)
    path.write("state.json", path.read("state.json").replace(b"-2.5e-17", b"NaN"))
    with pytest.raises(ValueError, match="state.json: the last rewards of 'a cat' hold NaN or infinity"):
        load_checkpoint(path)


def test_versions_whose_evaluation_is_not_read_yet_come_back(folder: Storage) -> None:
    before = checkpoint()
    average = pack(3, {"a.lora_A": np.ones((2, 3)), "a.lora_B": np.zeros((3, 2))})
    pending = (EvalVersion(before.learner.weights[0], None, 0.25), EvalVersion(before.learner.weights[1], average))
    state = EvaluationState(average, pending)
    after = load_checkpoint(save_checkpoint(folder, dataclasses.replace(before, evaluation=state), keep=2)).evaluation
    assert after.average is not None and after.average.fingerprint == average.fingerprint
    assert [each.policy_version for each in after.pending] == [2, 3]
    assert [each.kl_reference_nats for each in after.pending] == [0.25, None]
    first, second = after.pending
    assert (
        first.average is None and second.average is not None and np.array_equal(second.average.buffer, average.buffer)
    )
    assert first.current.fingerprint == pending[0].current.fingerprint
    assert load_checkpoint(save_checkpoint(folder, checkpoint(4), keep=2)).evaluation == EvaluationState()
