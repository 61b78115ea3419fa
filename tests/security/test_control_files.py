"""Foreign JSON of the wrong shape in a run's folder is reported, and ends a run only if it must."""

import json
import os
import socket
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.run_storage import lease
from ray_ddpo.common.run_storage.lease import Lease, runs_it
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.driver.supervision import Supervision
from ray_ddpo.learner.checkpoints.checkpoint import MANIFEST, load_checkpoint, newest_checkpoint
from tests.rounds import begun_run
from tests.security.test_file_names import committed

NO_OWNER = (b"", b"{", b"[]", b"null", b'"me"', b"7", b"{}", b'{"pid": 1}', b"\xff\xfe", b"[" * 5000)
NO_OWNER += tuple(
    json.dumps({"host": socket.gethostname(), "pid": pid, "time": 0.0}).encode()
    for pid in (-1, 0, 2**40, "1; rm -rf /", None, [1], {"a": 1})
)
NO_OWNER += tuple(
    json.dumps({"host": host, "pid": os.getpid(), "time": when}).encode()
    for host, when in ((None, 0), (7, 0), ("elsewhere", "now"), ("elsewhere", None))
)
ASKED_WRONGLY = (b"", b"{", b"[]", b"null", b"7", b'{"samplers": "2"}', b'{"samplers": -1}', b'{"samplers": 0}')
ASKED_WRONGLY += (b'{"samplers": 2.5}', b'{"samplers": [2]}', b'{"samplers": null}', b'{"samplers": true}', b"\xff")
ASKED_TOO_MUCH = ((b'{"samplers": 5}', "samplers.max = 4"), (b'{"cooks": 2}', "this run has no cooks"))


@pytest.fixture
def folder(tables: dict) -> RunFolder:
    return begun_run(tables)


def test_what_is_no_lease_is_taken_over_and_said(
    folder: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    for text in NO_OWNER:
        folder.storage.write("lease.json", text)
        assert runs_it(folder) is None, text
        with Lease(folder) as held:
            assert json.loads(folder.storage.read("lease.json"))["pid"] == os.getpid() and not held.lost
        assert "from a start that did not get far" in capsys.readouterr().err, text


def test_an_owner_whose_lease_is_overwritten_with_anything_notices(folder: RunFolder) -> None:
    for text in NO_OWNER:
        with Lease(folder) as held:
            folder.storage.write("lease.json", text)
            held._renew()
            assert held.lost, text
        folder.storage.remove("lease.json")


def test_status_says_how_a_run_stands_beside_any_lease(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    for text in NO_OWNER:
        folder.storage.write("lease.json", text)
        assert cli.main(["status", folder.location]) == 0
        assert "no process runs it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [*((text, "control.json cannot be used: it must be a JSON object") for text in ASKED_WRONGLY), *ASKED_TOO_MUCH],
)
def test_a_run_reports_a_nonsensical_request_once_and_continues(
    folder: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: bytes, said: str
) -> None:
    monkeypatch.setattr("ray_ddpo.deploy.driver.supervision.POLL_SECONDS", 0.0)
    wanted: list[int] = []
    with Lease(folder) as held, Supervision(folder, folder.load_recipe([]), held) as supervision:
        supervision.on_scale = {"samplers": wanted.append}
        folder.storage.write("control.json", text)
        for _ in range(3):
            supervision.check()
        printed = capsys.readouterr().err
        folder.storage.write("control.json", b'{"samplers": 3}')
        supervision.check()
    assert printed.count("request to scale refused") == 1 and said in printed
    assert wanted == [3]


def test_scale_beside_a_control_file_that_is_none_says_so(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    with Lease(folder):
        folder.storage.write("control.json", b"[]")
        assert cli.main(["scale", folder.location, "--samplers", "2"]) == 2
    assert "control.json cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"null", b"7", b'{"state.json": 7}', b'{"state.json": null}', b"\xff"]
)
def test_a_manifest_of_the_wrong_shape_makes_no_checkpoint(tmp_path: Path, manifest: bytes) -> None:
    checkpoint = committed(tmp_path)
    assert newest_checkpoint(Storage(tmp_path / "checkpoints")) is not None
    checkpoint.write(MANIFEST, manifest)
    assert newest_checkpoint(Storage(tmp_path / "checkpoints")) is None


@pytest.mark.parametrize("state", [b"[]", b"null", b"{}", b'{"policy_version": 1}', b'{"weights": 1}', b"{", b"\xff"])
def test_a_state_of_the_wrong_shape_is_said(tmp_path: Path, state: bytes) -> None:
    checkpoint = committed(tmp_path)
    checkpoint.write("state.json", state)
    with pytest.raises(ValueError, match="round-000001 is no checkpoint that can be read"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("manifest", [[["a", [-1]]], [["a", ["x"]]], [["a"]], "a", [["a", [10**12]]], None])
def test_weights_whose_shapes_do_not_fit_are_said(tmp_path: Path, manifest: object) -> None:
    checkpoint = committed(tmp_path)
    state = json.loads(checkpoint.read("state.json"))
    state["weights"][0]["manifest"] = manifest
    checkpoint.write("state.json", json.dumps(state).encode())
    with pytest.raises(ValueError):
        load_checkpoint(checkpoint)
