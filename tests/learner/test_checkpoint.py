"""Checkpoints: everything comes back, what is not whole is passed over, nothing is unpickled."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from common.lora_weights import pack
from learner import checkpoint as module
from learner.checkpoint import MANIFEST, Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from learner.learner import LearnerState


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
    state = LearnerState(rounds_done, weights, optimizer, {"scale": 65536.0, "growth_interval": 2000})
    statistics = {"a cat": (1 / 3, -2.5e-17, float(np.float32(0.1))), 'a "dog" é': (7.0,)}
    return Checkpoint(rounds_done, state, statistics)


def test_everything_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    before = checkpoint()
    after = load_checkpoint(save_checkpoint(tmp_path, before, keep=2))
    assert after.rounds_done == before.rounds_done and after.statistics == before.statistics
    assert after.learner.policy_version == before.learner.policy_version
    assert after.learner.scaler == before.learner.scaler
    assert type(after.learner.scaler["growth_interval"]) is int  # torch takes no other
    assert after.learner.optimizer.keys() == before.learner.optimizer.keys()
    for name, value in before.learner.optimizer.items():
        back = after.learner.optimizer[name]
        assert back.dtype == value.dtype and back.shape == value.shape and np.array_equal(back, value), name
    for old, new in zip(before.learner.weights, after.learner.weights, strict=True):
        assert new.policy_version == old.policy_version and new.fingerprint == old.fingerprint
        assert new.manifest == old.manifest and np.array_equal(new.buffer, old.buffer)


def test_files_are_json_and_safetensors_and_nothing_else(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=2)
    names = {file.name for file in path.iterdir()}
    weights = {"weights-000002.safetensors", "weights-000003.safetensors"}
    assert names == {MANIFEST, "state.json", "optimizer.safetensors", *weights}
    json.loads((path / "state.json").read_text())
    assert {"pickle", "torch"}.isdisjoint(vars(module))


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    for rounds_done in (1, 2, 10):
        save_checkpoint(tmp_path, checkpoint(rounds_done), keep=2)
    assert sorted(path.name for path in tmp_path.glob("round-*")) == ["round-000002", "round-000010"]
    assert (tmp_path / "latest").read_text() == "round-000010"
    assert newest_checkpoint(tmp_path) == tmp_path / "round-000010"


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "not there") is None


def test_one_without_a_manifest_was_never_committed(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, checkpoint(1), keep=5)
    (save_checkpoint(tmp_path, checkpoint(2), keep=5) / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "weights-000002.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_one_with_a_file_changed_or_gone_is_passed_over(name: str, damage: str, tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path, checkpoint(1), keep=5)
    file = save_checkpoint(tmp_path, checkpoint(2), keep=5) / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("failing", range(6))
def test_a_write_that_fails_at_any_file_leaves_the_older_checkpoint_the_newest(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    write, written = module.write_atomically, []

    def write_until_it_fails(path: Path, data: bytes) -> None:
        if len(written) == failing:
            raise OSError("no space left on device")
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(module, "write_atomically", write_until_it_fails)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    committed = MANIFEST in written  # then only the hint `latest` is missing
    newest = newest_checkpoint(tmp_path)
    assert newest == (tmp_path / "round-000002" if committed else older)
    assert load_checkpoint(newest).rounds_done == (2 if committed else 1)


def test_saving_a_round_again_replaces_what_was_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    again = dataclasses.replace(checkpoint(2), statistics={"a cow": (1.0,)})
    assert load_checkpoint(save_checkpoint(tmp_path, again, keep=2)).statistics == {"a cow": (1.0,)}


def test_weights_that_are_not_what_they_were_saved_as_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    state = json.loads((path / "state.json").read_text())
    state["weights"][1]["fingerprint"] = "0" * 64
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="weights of version 2 arrived with fingerprint"):
        load_checkpoint(path)
