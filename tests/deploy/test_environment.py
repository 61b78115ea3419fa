"""Runs without a network for wandb, without the cluster of RAY_ADDRESS, or with a long path for sockets."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from ray_ddpo.deploy.driver import cluster
from tests.failure_page import assert_documented

KEY = "0123456789" * 4
TOO_LONG = "x" * 60


@pytest.fixture
def recipe_file(tables: dict, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none({**tables, "rounds": 1})))
    return path


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on no cluster, and nothing says where one is."""
    ray.shutdown()  # a cluster that tests of this process share, which starts again when one needs it
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Refuses(http.server.BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A key of the right form, and a wandb that has read nothing of the environment yet."""
    import wandb

    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    yield
    wandb.teardown()


def run(capfd: pytest.CaptureFixture[str], verb: str, *words: object) -> tuple[int, str]:
    """The exit code of `ddpo VERB`, and all that it printed."""
    capfd.readouterr()
    exit_code = cli.main([verb, *(str(word) for word in words)])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


WITH_WANDB = ("--serial", "--trackers", '[{ name = "wandb" }]')


@pytest.mark.system
def test_without_a_network_wandb_is_kept_offline_and_doctor_says_so(
    recipe_file: Path,
    wandb_key: None,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port}")
    exit_code, printed = run(capfd, "train", recipe_file, *WITH_WANDB)
    assert_documented("`WANDB_API_KEY` is set and wandb cannot be reached", exit_code, printed)
    assert list((tmp_path / "runs" / "tiny" / "wandb").glob("offline-run-*/run-*.wandb"))
    exit_code, printed = run(capfd, "doctor", recipe_file, *WITH_WANDB[1:])
    assert exit_code == 0 and "warning  wandb" in printed and f"127.0.0.1:{free_port} does not answer" in printed


def test_a_key_that_wandb_refuses_ends_the_run_before_its_first_round(
    recipe_file: Path,
    wandb_key: None,
    refusing: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    exit_code, printed = run(capfd, "train", recipe_file, *WITH_WANDB)
    assert_documented("wandb refuses the key", exit_code, printed)
    assert KEY not in printed and refusing in printed
    exit_code, printed = run(capfd, "doctor", recipe_file, *WITH_WANDB[1:])
    assert_documented("`ddpo doctor`: wandb refuses the key", exit_code, printed)


def test_a_tracker_that_cannot_start_is_named(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "tensorboard").write_text("a file where a folder is expected")
    exit_code, printed = run(capfd, "train", recipe_file, "--serial", "--trackers", '[{ name = "tensorboard" }]')
    assert_documented("a tracker cannot be started", exit_code, printed)


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_a_temporary_folder_with_too_long_a_path_is_named_with_its_variable(
    verb: str,
    recipe_file: Path,
    no_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / TOO_LONG
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    exit_code, printed = run(capfd, verb, recipe_file)
    situation = {
        "train": "`TMPDIR` has too long a path for Ray's sockets",
        "doctor": "`ddpo doctor`: `TMPDIR` has too long a path for Ray's sockets",
    }
    assert_documented(situation[verb], exit_code, printed)
    assert str(folder) in printed


def test_the_longest_folder_that_is_accepted_leaves_room_for_rays_longest_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    room = cluster.SOCKET_BYTES - len(cluster.LONGEST_SOCKET) - 1
    monkeypatch.setenv("TMPDIR", "/" + "x" * (room - 1))
    cluster.check_temporary_folder()
    monkeypatch.setenv("TMPDIR", "/" + "x" * room)
    with pytest.raises(ValueError, match="TMPDIR is .* export RAY_TMPDIR=/tmp"):
        cluster.check_temporary_folder()


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_a_cluster_that_does_not_answer_is_named_at_once(
    verb: str,
    recipe_file: Path,
    no_cluster: None,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    exit_code, printed = run(capfd, verb, recipe_file)
    situation = {
        "train": "nobody answers at `RAY_ADDRESS`",
        "doctor": "`ddpo doctor`: nobody answers at `RAY_ADDRESS`",
    }
    assert_documented(situation[verb], exit_code, printed)


@pytest.mark.parametrize("address", ["garbage", "http://127.0.0.1:8265"])
def test_an_address_that_is_none_is_shown_with_the_form_that_is_expected(
    address: str,
    recipe_file: Path,
    no_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    exit_code, printed = run(capfd, "train", recipe_file)
    assert exit_code == 2 and "Traceback" not in printed
    assert f"RAY_ADDRESS {address!r}" in printed and "host:6379" in printed


@pytest.mark.parametrize("train", [True, False], ids=["train", "another error"])
def test_ray_that_does_not_start_in_time_is_one_line(
    train: bool, recipe_file: Path, no_cluster: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Ray's own wait is 30 s, so that `ray.init` is replaced by what it raises then: a bare Exception."""

    def too_late(**options: object) -> None:
        text = (
            "The current node timed out during startup. This could happen because some of the raylet failed to startup."
        )
        raise Exception(text) if train else LookupError(text)

    monkeypatch.setattr(ray, "init", too_late)
    if train:
        exit_code = cli.main(["train", str(recipe_file)])
        assert_documented("Ray's processes do not start in time", exit_code, "".join(capfd.readouterr()))
    else:  # what is no timeout keeps its kind
        with pytest.raises(LookupError):
            cluster.start_here(1)
