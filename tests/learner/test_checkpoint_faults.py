"""Faults at every file operation of a commit: what is found afterwards is the checkpoint before, or the new one."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.run_storage.filesystems import LocalFiles, RemoteFiles
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.checkpoints.shards import SHARD_BYTES

ON_DISK = ("put", "sync", "rename", "unlink", "make_folder", "remove_folder")
IN_STORE = ("put", "unlink", "remove_folder")
DEATH = 9  # exit code of a process that was made to die


def checkpoint(rounds_done: int, reward: float) -> Checkpoint:
    weights = pack(rounds_done, {"a": np.full((2, 3), reward)})
    moments = {f"a/exp_avg{power}": np.full(6, reward, np.float32) for power in ("", "_sq")}
    state = LearnerState(rounds_done, (weights,), moments, {})
    return Checkpoint(rounds_done, state, {"joined": {"a cat": (reward,)}})


def reward_found(folder: Storage) -> float:
    """Return the checkpoint that is there, by the number in all of its files."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    found = load_checkpoint(newest)
    (reward,) = found.statistics["joined"]["a cat"]
    assert np.all(found.learner.weights[0].buffer == np.float32(reward))
    assert len(found.learner.optimizer) == 2
    assert all(np.all(array == np.float32(reward)) for array in found.learner.optimizer.values())
    return reward


class Faults:
    """Counts the operations that change a filesystem, and lets one of them fail: half done, where it can be."""

    def __init__(self, files: type, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.failing = 0, -1
        self.fail: Callable[[], None] = lambda: None
        for name in names:
            monkeypatch.setattr(files, name, self._wrapped(name, getattr(files, name)))

    def arm(self, failing: int, fail: Callable[[], None]) -> None:
        self.count, self.failing, self.fail = 0, failing, fail

    def _wrapped(self, name: str, original: Callable) -> Callable:
        def operation(files: object, *arguments: object) -> None:
            number, self.count = self.count, self.count + 1
            if number == self.failing:
                if name == "put" and isinstance(files, LocalFiles):
                    Path(str(arguments[0])).write_bytes(arguments[1][: len(arguments[1]) // 2])  # type: ignore[index]
                self.fail()
            original(files, *arguments)

        return operation


def no_space() -> None:
    raise OSError("no space left on device")


def die() -> None:
    os._exit(DEATH)


def in_another_process(call: Callable[[], object]) -> int:
    """Run a function in a fork, which may die at any line without cleanup, and return the exit code."""
    pid = os.fork()
    if pid == 0:
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rubbish(path: Path) -> list[str]:
    """List everything below that belongs to no checkpoint."""
    wanted = {"manifest.json", "state.json", "latest"}
    files = [file for file in path.rglob("*") if file.is_file()]
    return [
        str(file) for file in files if file.name not in wanted and not file.name.startswith(("weights-", "optimizer"))
    ]


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("redone", "shard_bytes"),
    [
        pytest.param(False, SHARD_BYTES, id="a new round"),
        pytest.param(True, SHARD_BYTES, id="a round once more"),
        pytest.param(False, 8, id="a new round in shards", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("death", [False, True], ids=["the operation fails", "the process dies"])
def test_a_fault_at_any_file_operation_leaves_the_old_checkpoint_or_the_new(
    death: bool, redone: bool, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(LocalFiles, ON_DISK, monkeypatch)
    rounds_done, found = (1 if redone else 2), []

    def commit(folder: Storage, failing: int) -> bool:
        faults.arm(failing, die if death else no_space)
        save = lambda: save_checkpoint(folder, checkpoint(rounds_done, 2.0), 1, shard_bytes)  # noqa: E731
        if death:
            return in_another_process(save) == 0
        try:
            save()
        except OSError:
            return False
        return True

    for failing in range(200):
        folder = Storage(tmp_path / str(failing))
        save_checkpoint(folder, checkpoint(1, 1.0), 1, shard_bytes)
        whole = commit(folder, failing)
        faults.arm(-1, no_space)
        found.append(reward_found(folder))
        save_checkpoint(folder, checkpoint(3, 3.0), keep=1)
        assert reward_found(folder) == 3.0
        assert folder.names() == ["latest", "round-000003"] and rubbish(tmp_path / str(failing)) == []
        if whole:
            break
    assert whole and failing > 25, "every operation of the commit had its turn"
    assert set(found) == {1.0, 2.0} and sorted(found) == found, "old until the manifest, new from then on"


@pytest.mark.thorough
def test_a_fault_at_any_operation_leaves_the_old_checkpoint_or_the_new(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, found = Faults(RemoteFiles, IN_STORE, monkeypatch), []
    for failing in range(50):
        folder = Storage(f"{bucket}/{failing}").with_patience(0.0)
        save_checkpoint(folder, checkpoint(1, 1.0), keep=1)
        faults.arm(failing, no_space)
        whole = True
        try:
            save_checkpoint(folder, checkpoint(2, 2.0), keep=1)
        except OSError:
            whole = False
        faults.arm(-1, no_space)
        found.append(reward_found(folder))
        save_checkpoint(folder, checkpoint(3, 3.0), keep=1)
        assert reward_found(folder) == 3.0 and folder.names() == ["latest", "round-000003"]
        if whole:
            break
    assert whole and failing >= 6 and set(found) == {1.0, 2.0} and sorted(found) == found
