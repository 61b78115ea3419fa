"""Weights & Biases without a network: never asks, keeps to one id, and sends nothing that is not the run's."""

import math
from pathlib import Path
from typing import Any

import pytest

from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trackers.media import Media
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.common.trackers.wandb_run import WandbRun, connection


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


class FakeWandb:
    """Keeps what it was started with."""

    def __init__(self) -> None:
        self.arguments: dict = {}
        self.id = ""
        self.starting_step = 0  # as the service says
        self.logged: list[tuple[int, dict]] = []

    def init(self, **arguments: object) -> "FakeWandb":
        self.arguments = arguments
        self.id = arguments["id"]
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """As wandb's own."""

    def log(self, what: dict, step: int, commit: bool) -> None:
        self.logged.append((step, what))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    import wandb

    fake = FakeWandb()
    monkeypatch.setattr(wandb, "init", fake.init)
    return fake


def test_without_a_login_it_is_offline_and_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise AssertionError("asked for a login")

    monkeypatch.setattr("wandb.errors.term._terminput", fail)
    assert connection() == ("offline", "")


@pytest.mark.parametrize("wanted", ["offline", "disabled"])
def test_a_user_who_switches_the_network_off_is_obeyed(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setenv("WANDB_MODE", wanted)
    assert connection() == (wanted, "")


def test_with_a_login_it_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.login", lambda prompt: not prompt)
    assert connection() == ("online", "")


def identities_of_a_run(folder: Path, **what: Any) -> dict[str, str]:
    """What the real wandb, offline, leaves for the checkpoint."""
    trackers = FanOut({"wandb": WandbRun()})
    trackers.start(RunInfo("tiny", folder, {}, 5, 0, **what))
    trackers.finish()
    return trackers.identities()


def test_a_resumed_run_keeps_the_checkpoints_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    first = identities_of_a_run(tmp_path / "first")
    assert identities_of_a_run(tmp_path / "moved", tracker_ids=first) == first
    assert identities_of_a_run(tmp_path / "first") != first
    for folder, runs in (("first", 2), ("moved", 1)):
        assert len(list((tmp_path / folder / "wandb").glob("offline-run-*/run-*.wandb"))) == runs
    assert list((tmp_path / "moved" / "wandb").glob(f"offline-run-*/run-{first['wandb']}.wandb"))


def test_the_keys_and_the_recipe_are_what_wandb_is_started_with(fake: FakeWandb, tmp_path: Path) -> None:
    recipe = {"seed": 3, "reward": {"name": "aesthetic"}}
    tracker = WandbRun(project="cats", entity="lab", group="sweep", tags=("a", "b"))
    tracker.start(RunInfo("tiny", tmp_path / "tiny", recipe, 5, 2, {"wandb": "a1b2c3d4", "other": "e5"}))
    expected = {
        "project": "cats",
        "entity": "lab",
        "group": "sweep",
        "tags": ("a", "b"),
        "name": "tiny",
        "config": recipe,
    }
    assert fake.arguments | expected == fake.arguments
    assert fake.arguments["dir"] == tmp_path / "tiny" and fake.arguments["id"] == "a1b2c3d4"


@pytest.mark.parametrize(("there", "sent"), [(0, [0, 1, 2, 3, 4]), (2, [2, 3, 4]), (4, [4]), (9, [])])
def test_online_the_service_says_which_rounds_it_has_and_it_is_sent_the_others(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, sent: list[int]
) -> None:
    monkeypatch.setattr("wandb.login", lambda prompt: not prompt)
    (tmp_path / "metrics.jsonl").write_text(
        '{"round": 0.0, "loss": null}\n{"round": 1.0, "loss": 4.0}\n{"round": 2.0}\n'
    )
    fake.starting_step = there
    live = WandbRun().start(RunInfo("tiny", tmp_path, {}, 5, 2, {"wandb": "a1b2c3d4"}))
    for round_index in range(2, 5):
        live.show(Media(round_index))
        live.log({"round": float(round_index)})
    assert list(dict.fromkeys(step for step, _ in fake.logged)) == sent
    if not there:
        assert math.isnan(fake.logged[0][1]["loss"]) and fake.logged[1][1]["loss"] == 4.0


def test_neither_code_nor_git_nor_the_terminals_text_is_sent(fake: FakeWandb, tmp_path: Path) -> None:
    WandbRun().start(RunInfo("tiny", tmp_path, {}, 5, 0))
    settings = fake.arguments["settings"]
    assert settings.disable_code and settings.disable_git and settings.console == "off"
