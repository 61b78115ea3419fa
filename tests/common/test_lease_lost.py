"""A lease taken by another process: the former owner writes nothing more, even after a suspension or on a full disk."""

import json
import time
from pathlib import Path

import pytest

from ray_ddpo.common.run_storage import lease
from ray_ddpo.common.run_storage.filesystems import LocalFiles
from ray_ddpo.common.run_storage.lease import LEASE_SECONDS, Lease, LeaseLost
from ray_ddpo.common.run_storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def test_a_process_that_was_suspended_looks_at_its_lease_before_it_writes_on(folder: RunFolder) -> None:
    with Lease(folder) as held:
        folder.storage.write("file", b"mine")
        leave_lease_on_disk(folder)
        held._renewed -= LEASE_SECONDS  # as after a suspension, before the thread that renews it has had its turn
        with pytest.raises(LeaseLost):
            folder.storage.write("file", b"mine still")
        with pytest.raises(LeaseLost):
            folder.checkpoints.remove("round-000001")
    assert folder.storage.read("file") == b"mine" and b"elsewhere" in folder.storage.read("lease.json")


def leave_lease_on_disk(folder: RunFolder) -> None:
    Path(folder.location, "lease.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "time": time.time()}))


def test_a_lease_that_can_be_read_and_not_written_is_not_lost(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.02)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.1)
    with Lease(folder) as held, monkeypatch.context() as full:
        full.setattr(LocalFiles, "put", no_room)
        time.sleep(0.5)
        assert not held.lost
    assert "the lease cannot be renewed" in capsys.readouterr().err


def no_room(*_: object) -> None:
    raise OSError("no space left on device")
