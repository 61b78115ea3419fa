"""The lease on a run's folder: one of many starts gets it, the dead lose it at once, and losers notice."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ray_ddpo.common.run_storage import lease
from ray_ddpo.common.run_storage.lease import LEASE_SECONDS, Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def remote(bucket: str, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.2)
    made = RunFolder(f"{bucket}/runs/one")
    made.create()
    return made


def leave_lease(folder: RunFolder, host: str, pid: int, age: float, **more: object) -> None:
    owner = {"host": host, "pid": pid, "time": time.time() - age, "token": "of another", **more}
    folder.storage.write("lease.json", json.dumps(owner).encode())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def written(folder: RunFolder) -> dict:
    return json.loads(folder.storage.read("lease.json"))


def owner(folder: RunFolder) -> tuple[str, int]:
    return written(folder)["host"], written(folder)["pid"]


def renewed(folder: RunFolder, seconds: float = 5) -> bool:
    """Return whether the lease's time advances."""
    first, deadline = written(folder)["time"], time.monotonic() + seconds
    while time.monotonic() < deadline:
        if written(folder)["time"] != first:
            return True
        time.sleep(0.01)
    return False


def becomes_lost(held: Lease, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    return held.lost


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
    assert not folder.storage.exists("lease.json")
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


def test_a_lease_of_another_host_that_is_not_renewed_is_taken_over(
    folder: RunFolder, capsys: pytest.CaptureFixture
) -> None:
    leave_lease(folder, "elsewhere", os.getpid(), age=LEASE_SECONDS + 1)
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())
    assert f"taking over {folder.location} from process {os.getpid()} on elsewhere" in capsys.readouterr().err


def test_a_process_that_has_the_pid_of_a_dead_owner_is_not_that_owner(folder: RunFolder) -> None:
    started = psutil.Process().create_time()
    leave_lease(folder, socket.gethostname(), os.getpid(), age=0, started=started)
    with pytest.raises(ValueError, match="in use"), Lease(folder):
        pass
    leave_lease(folder, socket.gethostname(), os.getpid(), age=0, started=started - 3600)
    with Lease(folder):
        assert written(folder)["started"] == started


def test_a_zombie_process_is_not_alive(folder: RunFolder) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    leave_lease(folder, socket.gethostname(), process.pid, age=0)
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())
    process.wait()


def test_a_lease_that_never_got_its_text_is_taken_over(
    folder: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)
    folder.storage.write("lease.json", b"")
    with Lease(folder):
        assert owner(folder) == (socket.gethostname(), os.getpid())
    assert "from a start that did not get far" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", "remote"])
def test_a_living_owner_renews_its_lease(
    place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(place)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.01)
    with Lease(folder) as held:
        assert renewed(folder) and not held.lost


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("place", ["folder", "remote"])
@pytest.mark.parametrize("how", ["taken", "removed"])
def test_an_owner_notices_that_its_lease_is_no_longer_its_own_and_leaves_the_new_one(
    place: str, how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = request.getfixturevalue(place)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    deadline = time.monotonic() + 30
    with Lease(folder) as held:
        while not held.lost and time.monotonic() < deadline:  # a renewal at the same instant writes over it
            if how == "taken":
                leave_lease(folder, "elsewhere", 7, age=0)
            elif folder.storage.exists("lease.json"):
                folder.storage.remove("lease.json")
            becomes_lost(held, seconds=1.0)
        assert held.lost
    assert "is lost: this run must write nothing more there" in capsys.readouterr().err
    assert folder.storage.exists("lease.json") == (how == "taken")
    if how == "taken":
        assert owner(folder) == ("elsewhere", 7)


def test_a_lease_that_cannot_be_renewed_for_a_minute_counts_as_lost(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    with Lease(folder) as held:
        assert renewed(folder)
        moved = Path(folder.location).rename(Path(folder.location).with_name("away"))
        time.sleep(0.1)
        assert not held.lost, "one failure is not yet a minute of them"
        assert becomes_lost(held)
        moved.rename(folder.location)


def start(location: str, barrier: object, results: object) -> None:
    """Try to take the folder at the same instant as others, and hold it until all have tried."""
    held = Lease(RunFolder(location))
    barrier.wait(30)  # type: ignore[attr-defined]
    try:
        with held:
            results.append("won")  # type: ignore[attr-defined]
            barrier.wait(30)  # type: ignore[attr-defined]
    except ValueError as error:
        results.append(str(error))  # type: ignore[attr-defined]
        barrier.wait(30)  # type: ignore[attr-defined]


@pytest.mark.parametrize("before", ["nobody", "somebody dead"])
def test_of_many_starts_at_the_same_instant_exactly_one_wins(folder: RunFolder, before: str) -> None:
    for _ in range(10):
        if before == "somebody dead":
            leave_lease(folder, "elsewhere", 1, age=LEASE_SECONDS + 1)
        barrier, results = threading.Barrier(8), []
        threads = [threading.Thread(target=start, args=(folder.location, barrier, results)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results.count("won") == 1 and len(results) == 8
        assert all("is in use by" in result for result in results if result != "won")
    assert folder.storage.names() == []


@pytest.mark.parametrize("before", ["nobody", "somebody dead"])
def test_of_many_processes_exactly_one_wins(folder: RunFolder, before: str) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        if before == "somebody dead":
            leave_lease(folder, socket.gethostname(), dead_pid(), age=0)
        barrier, results = context.Barrier(8), manager.list()
        starts = [context.Process(target=start, args=(folder.location, barrier, results)) for _ in range(8)]
        for process in starts:
            process.start()
        for process in starts:
            process.join(60)
        assert list(results).count("won") == 1 and len(results) == 8


def test_where_folders_cannot_be_locked_exactly_one_still_wins(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(lease.fcntl, "flock", refuse)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)
    leave_lease(folder, "elsewhere", 1, age=LEASE_SECONDS + 1)
    barrier, results = threading.Barrier(8), []
    threads = [threading.Thread(target=start, args=(folder.location, barrier, results)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results.count("won") == 1 and len(results) == 8


def test_in_an_object_store_one_of_two_starts_wins_and_the_dead_are_taken_over(remote: RunFolder) -> None:
    leave_lease(remote, "elsewhere", 1, age=LEASE_SECONDS + 1)
    barrier, results = threading.Barrier(3), []
    threads = [threading.Thread(target=start, args=(remote.location, barrier, results)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results.count("won") == 1 and len(results) == 3
    assert not remote.storage.exists("lease.json")


def test_a_second_start_in_an_object_store_is_refused_and_told_by_whom(remote: RunFolder) -> None:
    text = f"{remote.location} is in use by process {os.getpid()} on {socket.gethostname()}"
    with Lease(remote), pytest.raises(ValueError, match=text), Lease(remote):
        pass
