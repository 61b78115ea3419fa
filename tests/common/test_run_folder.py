"""The run's folder: who may use it, and what its recipe says when it is read again."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from common import run_folder
from common.config import Recipe
from common.run_folder import LEASE_SECONDS, Lease, RunFolder, write_atomically


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def leave_lease(folder: RunFolder, host: str, pid: int, age: float) -> None:
    owner = {"host": host, "pid": pid, "time": time.time() - age}
    (folder.path / "lease.json").write_text(json.dumps(owner))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def owner(folder: RunFolder) -> tuple[str, int]:
    lease = json.loads((folder.path / "lease.json").read_text())
    return lease["host"], lease["pid"]


def test_a_second_start_is_refused_and_told_by_whom(folder: RunFolder) -> None:
    text = f"in use by process {os.getpid()} on {socket.gethostname()}"
    with Lease(folder), pytest.raises(ValueError, match=text), Lease(folder):
        pass


def test_a_refused_start_leaves_the_owners_lease_where_it_is(folder: RunFolder) -> None:
    with Lease(folder):
        with pytest.raises(ValueError, match="in use"), Lease(folder):
            pass
        assert owner(folder) == (socket.gethostname(), os.getpid())


def test_a_lease_ends_with_its_block_also_when_the_run_fails(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), Lease(folder):
        _ = 1 / 0
    assert not (folder.path / "lease.json").exists()
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())


def test_the_lease_of_a_dead_process_on_this_host_is_taken_over_at_once(folder: RunFolder) -> None:
    leave_lease(folder, socket.gethostname(), dead_pid(), age=0)
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())


def test_an_old_lease_of_a_living_process_on_this_host_still_stands(folder: RunFolder) -> None:
    leave_lease(folder, socket.gethostname(), os.getpid(), age=10 * LEASE_SECONDS)
    with pytest.raises(ValueError, match="in use"), Lease(folder):
        pass


def test_a_fresh_lease_of_another_host_is_refused_though_its_process_is_not_here(folder: RunFolder) -> None:
    leave_lease(folder, "elsewhere", dead_pid(), age=LEASE_SECONDS - 5)
    with (
        pytest.raises(ValueError, match=r"on elsewhere \(seen 55 s ago\): stop it, or give another name"),
        Lease(folder),
    ):
        pass


def test_a_lease_of_another_host_that_nobody_renews_is_taken_over_and_said(
    folder: RunFolder, capsys: pytest.CaptureFixture
) -> None:
    leave_lease(folder, "elsewhere", os.getpid(), age=LEASE_SECONDS + 1)
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())
    assert f"taking over {folder.path} from process {os.getpid()} on elsewhere" in capsys.readouterr().err


def test_a_living_owner_renews_its_lease(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "RENEWAL_SECONDS", 0.01)
    with Lease(folder):
        first = json.loads((folder.path / "lease.json").read_text())["time"]
        deadline = time.monotonic() + 5
        while json.loads((folder.path / "lease.json").read_text())["time"] == first:
            assert time.monotonic() < deadline, "the lease was not renewed"
            time.sleep(0.01)


def test_an_output_dir_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    with pytest.raises(ValueError, match=f"output_dir: the run folder {path} cannot be written: Not a directory"):
        RunFolder(path).create()


def test_making_a_folder_leaves_no_trace_of_the_trial(folder: RunFolder) -> None:
    assert list(folder.path.iterdir()) == []


def test_a_recipe_comes_back_from_its_file_as_it_was(folder: RunFolder, tables: dict) -> None:
    recipe = Recipe.parse({**tables, "trackers": [{"name": "tensorboard"}], "max_policy_lag": 1})
    folder.write_recipe(recipe.model_dump())
    assert Recipe.load(folder.recipe) == recipe
    assert tomllib.loads(folder.recipe.read_text())["policy"]["name"] == "stable_diffusion"


def test_the_recipes_head_says_which_versions_ran_it(folder: RunFolder, recipe: Recipe) -> None:
    import torch

    folder.write_recipe(recipe.model_dump())
    head = folder.recipe.read_text().splitlines()
    assert f"# torch {torch.__version__}" in head and any(line.startswith("# ray-ddpo ") for line in head)


def test_a_write_that_fails_leaves_the_old_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
