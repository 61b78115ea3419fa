"""Each check by itself: what it takes for a fault, a warning or nothing, and what it advises."""

import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ray_ddpo.actors.rewards.aesthetic import Aesthetic
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.common.model_files.model_hub import Weights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.lease import Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.trackers.wandb_run import WandbRun
from ray_ddpo.deploy.commands.doctor import checks as doctor_checks
from ray_ddpo.deploy.commands.doctor.checks import (
    authentication_finding,
    checkpoint_bytes,
    compared,
    device_finding,
    disk_finding,
    folder_findings,
    reward_findings,
    tracker_findings,
    version_findings,
    weights_findings,
)
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from tests.tiny_clip import save_tiny_clip, save_tiny_head

TOKEN = "f00dfacef00dfacef00dface"
EXPORT = "export RAY_AUTH_MODE=token"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    return tmp_path


def test_what_is_installed_here_meets_the_lower_bounds() -> None:
    (finding,) = version_findings()
    assert finding.level == "ok" and "torch 2." in finding.found and "python 3." in finding.found


def test_a_dependency_that_is_missing_or_too_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Requirement(text) for text in ("torch>=99", "ray[default]>=2", "no-such-package")]
    monkeypatch.setattr(doctor_checks, "_dependencies", lambda: wanted)
    (finding,) = version_findings()
    assert finding.level == "fault" and ">=99 is needed" in finding.found
    assert "no-such-package is not installed" in finding.found and "ray" not in finding.found


def test_a_mode_that_is_not_set_beside_a_token_is_the_trap(home: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for environment, folder in (
        ({}, home),
        ({"RAY_AUTH_TOKEN": TOKEN}, nowhere),
        ({"RAY_AUTH_TOKEN_PATH": str(home / ".ray/auth_token")}, nowhere),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, nowhere),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}, nowhere),
    ):
        finding = authentication_finding(environment, folder)
        assert (finding.level, finding.advice) == ("warning", EXPORT), environment
        assert TOKEN not in finding.found


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "auto"}],
)
def test_a_mode_that_is_said_is_no_trap(home: Path, environment: dict[str, str]) -> None:
    assert authentication_finding(environment, home).level == "ok"


def test_nothing_set_and_no_token_is_no_trap_and_a_cluster_without_its_token_is_a_fault(tmp_path: Path) -> None:
    assert authentication_finding({}, tmp_path).level == "ok"
    finding = authentication_finding({"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "auto"}, tmp_path)
    assert finding.level == "fault" and "RAY_AUTH_TOKEN_PATH" in finding.advice


def test_a_folder_that_can_be_written_is_left_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    deep = recipe.model_copy(update={"output_dir": str(tmp_path / "a" / "b")})
    before = sorted(tmp_path.rglob("*"))
    (finding,) = folder_findings(deep)
    assert finding.level == "ok" and sorted(tmp_path.rglob("*")) == before


def test_nothing_is_left_in_an_object_store(recipe: Recipe, bucket: str) -> None:
    (finding,) = folder_findings(recipe.model_copy(update={"output_dir": f"{bucket}/runs"}))
    # An object store may keep output_dir's own name; nothing is in it.
    assert finding.level == "ok" and RunFolder(f"{bucket}/runs").storage.names() == []


def test_a_folder_that_is_a_file_cannot_be_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = folder_findings(recipe.model_copy(update={"output_dir": str(tmp_path / "file" / "runs")}))
    assert finding.level == "fault" and "cannot be written" in finding.found and "--output_dir" in finding.advice


def test_a_run_of_the_same_name_is_told_and_one_that_is_alive_is_a_fault(recipe: Recipe) -> None:
    folder = RunFolder(recipe.run_path())
    folder.create()
    folder.write_recipe(recipe.model_dump())
    (finding,) = folder_findings(recipe)
    assert finding.level == "warning" and "--resume auto" in finding.advice
    with Lease(folder):
        (finding,) = folder_findings(recipe)
        assert finding.level == "fault" and f"in use by process {os.getpid()}" in finding.found
    assert sorted(folder.storage.names()) == ["recipe.toml"]


def test_a_checkpoint_has_each_version_and_two_moments(recipe: Recipe) -> None:
    numbers = plan_of(recipe)
    lagging = recipe.model_copy(update={"max_policy_lag": 2})
    assert checkpoint_bytes(lagging, numbers) == 5 * 4 * numbers.sizes.trained_parameters
    assert "for 3 checkpoints" in disk_finding(recipe, numbers).found and disk_finding(recipe, numbers).level == "ok"


def test_bytes_are_a_fault_over_what_is_there_and_a_warning_over_four_fifths_of_it() -> None:
    levels = [compared("disk", "it", needed, 100, "less").level for needed in (80, 81, 100, 101)]
    assert levels == ["ok", "warning", "warning", "fault"]


def test_an_actor_without_a_gpu_cannot_compute_on_cuda(recipe: Recipe) -> None:
    runtime = recipe.runtime.model_copy(update={"device": "cuda"})
    finding = device_finding(recipe.model_copy(update={"runtime": runtime}))
    assert finding.level == "fault" and "learner.num_gpus" in finding.advice


@pytest.mark.parametrize(("mode", "level"), [("offline", "ok"), ("disabled", "ok"), (None, "warning")])
def test_wandb_without_a_login_is_told_unless_it_is_asked_for(
    mode: str | None, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    first, last = tracker_findings({"wandb": WandbRun()})
    assert first.level == level and (mode or "offline") in first.found and last.level == "ok"


def test_files_that_lack_name_who_needs_them_and_the_key(tmp_path: Path) -> None:
    (finding,) = weights_findings("reward", "it", (Weights(str(tmp_path), ("head.pth",), "reward.head"),))
    assert finding.level == "fault" and f"it needs head.pth in {tmp_path}" in finding.found
    assert "reward.head" in finding.advice


@pytest.mark.parametrize(("answers", "level"), [(False, "fault"), (True, "warning")])
def test_what_the_hub_would_give_is_a_warning(
    answers: bool, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor_checks, "hub_answers", lambda: answers)
    findings = weights_findings("reward", "aesthetic", Aesthetic().needs())
    assert [finding.level for finding in findings] == [level, level]
    assert "openai/clip-vit-large-patch14" in findings[0].found and "aesthetic-model.pth" in findings[1].found


def test_a_reward_whose_weights_are_there_is_loaded_and_a_damaged_one_told(tmp_path: Path) -> None:
    clip, head = save_tiny_clip(tmp_path / "clip"), save_tiny_head(tmp_path / "head.safetensors")
    reward = Aesthetic(clip=str(clip), head=str(head))
    assert [finding.level for finding in reward_findings("reward", "aesthetic", reward)] == ["ok"]
    head.write_bytes(b"no weights")
    (finding,) = reward_findings("reward", "aesthetic", reward)
    assert finding.level == "fault" and "is damaged" in finding.found


def test_a_function_is_imported_and_one_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        reward_findings("reward", "function", FunctionReward(path="tests.user_functions:brightness"))[0].level == "ok"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_reward.py").write_text("import no_such_package")
    for path, words in (("nowhere:score", "no module 'nowhere'"), ("broken_reward:score", "no_such_package")):
        (finding,) = reward_findings("reward", "function", FunctionReward(path=path))
        assert finding.level == "fault" and words in finding.found and "\n" not in finding.found
