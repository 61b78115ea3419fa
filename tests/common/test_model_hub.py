"""The hub as a source: cached files need no network, and without a network an error comes soon."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_ddpo.common.model_files import model_hub
from ray_ddpo.common.model_files.model_hub import (
    Weights,
    cannot_load,
    file_from_hub,
    hub_answers,
    is_hub_name,
    missing_files,
    read_from_hub,
    read_pretrained,
)


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Keep the server's log out of the tests' output."""


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_on_disk_is_read_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(model_hub, "hub_answers", fail)
    assert read_from_hub(lambda local_files_only: f"local {local_files_only}", "missing") == "local True"


def test_what_is_not_on_disk_is_downloaded_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(local_files_only: bool) -> str:
        if local_files_only:
            raise OSError("not in the cache")
        return "downloaded"

    monkeypatch.setattr(model_hub, "hub_answers", lambda: True)
    assert read_from_hub(read, "missing") == "downloaded"


def test_a_file_that_was_downloaded_is_found_and_another_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(model_hub, "hub_answers", lambda: False)
    repository = tmp_path / "models--owner--model"
    for folder in ("refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "weights.pt").write_text("numbers")
    assert Path(file_from_hub("owner/model", "weights.pt", "missing")).read_text() == "numbers"
    with pytest.raises(ValueError, match="^weights lack .*the hub does not answer"):
        file_from_hub("owner/model", "other.pt", "weights lack")


def test_what_cannot_be_loaded_is_said_with_key_files_and_remedy() -> None:
    said = cannot_load(Weights("owner/model", ("config.json", "*.safetensors"), "reward.clip"))
    assert said.startswith("reward.clip is 'owner/model', which cannot be loaded")
    assert "config.json, *.safetensors" in said and said.endswith("set reward.clip to where they are")


@pytest.mark.parametrize(("answers", "reason"), [(False, "the hub does not answer"), (True, "no such model")])
def test_the_error_says_what_is_missing_and_why_and_shows_no_other_errors(
    monkeypatch: pytest.MonkeyPatch, answers: bool, reason: str
) -> None:
    def read(local_files_only: bool) -> str:
        raise OSError("no such model\nread the manual at …")

    monkeypatch.setattr(model_hub, "hub_answers", lambda: answers)
    with pytest.raises(ValueError, match=f"^the model x is needed .*{reason}") as error:
        read_from_hub(read, "the model x is needed")
    assert error.value.__suppress_context__ and "manual" not in str(error.value)


def test_a_server_that_refuses_has_answered(monkeypatch: pytest.MonkeyPatch, refusing_hub: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", refusing_hub)
    assert hub_answers()


def test_a_server_whose_certificate_is_no_good_has_answered(monkeypatch: pytest.MonkeyPatch, refusing_hub: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", refusing_hub.replace("http:", "https:"))
    assert hub_answers()


def test_closed_and_silent_ports_do_not_answer_and_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not hub_answers(seconds=0.2)
        silent.listen()
        assert not hub_answers(seconds=0.2)
        assert time.monotonic() - start < 3


def test_offline_by_the_users_own_setting_asks_nobody(monkeypatch: pytest.MonkeyPatch, refusing_hub: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", refusing_hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_answers()


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "owner/model.v2"])
def test_owner_and_model_is_a_hub_name(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["/clip", "./clip", "../clip", "~/clip", "models/clip/large", "clip", "owner/"])
def test_a_path_or_a_bare_word_is_no_hub_name(name: str) -> None:
    assert not is_hub_name(name)


def test_files_of_a_folder_are_found_by_name_and_by_pattern(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "model_index.json").touch()
    files = ("model_index.json", "unet/*.safetensors", "vae/*.safetensors")
    assert missing_files(Weights(str(tmp_path), files, "policy.model")) == ["vae/*.safetensors"]
    assert missing_files(Weights(str(tmp_path / "nowhere"), files, "policy.model")) == list(files)


def test_files_of_a_hub_name_are_looked_for_in_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights("owner/model", ("config.json", "*.safetensors"), "reward.clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert missing_files(weights) == ["config.json", "*.safetensors"]
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert missing_files(weights) == ["*.safetensors"]
    (snapshot / "model.safetensors").touch()
    assert missing_files(weights) == []


def test_a_pretrained_model_is_read_from_a_folder_or_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, bool]] = []

    def read(where: object, local_files_only: bool) -> str:
        asked.append((where, local_files_only))
        if where != tmp_path:
            raise OSError("not there\nread the manual at …")
        return "read"

    monkeypatch.setattr(model_hub, "hub_answers", lambda: True)
    assert read_pretrained(str(tmp_path), read, "needed") == "read"
    for source in (str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ValueError, match=r"^needed \(not there\)$"):
            read_pretrained(source, read, "needed")
    assert all(local_files_only for _, local_files_only in asked)
    with pytest.raises(ValueError, match=r"^needed \(not there\)$"):
        read_pretrained("owner/model", read, "needed")
    assert asked[-2:] == [("owner/model", True), ("owner/model", False)]
