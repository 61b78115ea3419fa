"""Supervision: signals and a lost lease stop a run between two steps; `ddpo scale` reaches it through its folder."""

import os
import signal
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.run_storage.lease import Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.scale import scale
from ray_ddpo.deploy.driver.supervision import Stopped, Supervision
from tests.rounds import begun_run


@pytest.fixture
def folder(tables: dict) -> RunFolder:
    return begun_run(tables)


def supervised(folder: RunFolder, lease: Lease) -> Supervision:
    return Supervision(folder, folder.load_recipe([]), lease)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_the_run_at_the_next_check_and_not_before(
    folder: RunFolder, number: signal.Signals, exit_code: int
) -> None:
    before = signal.getsignal(number)
    with Lease(folder) as lease, supervised(folder, lease) as supervision:
        supervision.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
            supervision.check()
    assert stopped.value.exit_code == exit_code and stopped.value.may_commit
    assert signal.getsignal(number) == before


def test_a_closed_terminal_stops_nothing_that_ignores_it(folder: RunFolder) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Lease(folder) as lease, supervised(folder, lease) as supervision:
            os.kill(os.getpid(), signal.SIGHUP)
            supervision.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_does_not_wait_for_a_commit(folder: RunFolder) -> None:
    with Lease(folder) as lease, supervised(folder, lease), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_whose_folder_is_taken_over_stops_and_writes_nothing_more(folder: RunFolder) -> None:
    with Lease(folder) as lease, supervised(folder, lease) as supervision:
        folder.storage.write("lease.json", b'{"token": "another"}')
        lease._renew()
        with pytest.raises(Stopped, match="another process has taken over") as stopped:
            supervision.check()
    assert not stopped.value.may_commit and stopped.value.exit_code == 1


def test_scale_reaches_the_run_once_for_each_number(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ddpo.deploy.driver.supervision.POLL_SECONDS", 0.0)
    wanted: list[int] = []
    with Lease(folder) as lease, supervised(folder, lease) as supervision:
        supervision.on_scale = {"samplers": wanted.append}
        for count in (3, 3, 2):
            assert scale(folder.location, {"samplers": count}) == f"asked for {count} samplers"
            supervision.check()
            supervision.check()
    assert wanted == [3, 2]


def test_what_was_asked_of_an_earlier_start_is_forgotten(folder: RunFolder) -> None:
    folder.ask({"samplers": 4})
    with Lease(folder) as lease, supervised(folder, lease):
        assert folder.asked() == {}


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_scale_says_what_is_wrong_with_it(folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "is no run's folder" in said(capsys, "scale", str(tmp_path), "--samplers", "2")
    assert "needs --samplers N" in said(capsys, "scale", folder.location)
    with Lease(folder):
        text = said(capsys, "scale", folder.location, "--samplers", "5")
        assert "samplers is 5" in text and "samplers.max = 4" in text
        assert "samplers is 0" in said(capsys, "scale", folder.location, "--samplers", "0")
    assert "no process runs" in said(capsys, "scale", folder.location, "--samplers", "2")
