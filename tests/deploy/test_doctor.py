"""ddpo doctor from the command line: diagnosis, exit code, and no files left."""

from itertools import pairwise
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none

TOKEN = "f00dfacef00dfacef00dface"


@pytest.fixture
def recipe_file(tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none(tables)))
    return path


def said(capsys: pytest.CaptureFixture, exit_code: int, *arguments: object) -> list[list[str]]:
    """What `ddpo doctor` prints, a list of words a line; that it ends with `exit_code`."""
    assert cli.main(["doctor", *(str(argument) for argument in arguments)]) == exit_code
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def finding(lines: list[list[str]], subject: str) -> tuple[str, str]:
    """The mark of a subject's line, and its text with the advice below it."""
    (index,) = [index for index, words in enumerate(lines) if words[1:2] == [subject]]
    after = lines[index + 1] if index + 1 < len(lines) and lines[index + 1][:1] == ["→"] else []
    return lines[index][0], " ".join([*lines[index][2:], *after])


@pytest.mark.rotated(every=2, group="longest")
def test_a_healthy_recipe_has_no_fault_and_nothing_is_left_behind(
    recipe_file: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    lines = said(capsys, 0, recipe_file)
    assert sorted(tmp_path.rglob("*")) == before
    assert not [words for words in lines if words[:1] == ["fault"]] and lines[-1][:2] == ["0", "faults,"]
    assert finding(lines, "ratio")[0] == finding(lines, "model")[0] == finding(lines, "reward")[0] == "ok"
    assert finding(lines, "learner") == ("ok", "1 of 1 have a place; each asks for CPU 1")


def test_float16_latents_keep_the_ratio_at_one_and_clipping_by_rounding_is_told(
    recipe_file: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--sampling.latents_dtype", "float16", "--algorithm.clip_range", "1e-6")
    lines = said(capsys, 0, recipe_file, *options)
    mark, text = finding(lines, "latents_dtype")
    assert mark == "warning" and "float16" in text and "the ratio stays 1" in text
    assert "sampling.latents_dtype float32" in text
    mark, text = finding(said(capsys, 0, recipe_file, *options[:2], "--algorithm.clip_range", "1.0"), "latents_dtype")
    assert mark == "ok" and "0.0% of the ratios" in text


def test_a_reward_without_its_weights_is_a_fault_that_names_it_and_both_hub_names(
    recipe_file: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = said(capsys, 1, recipe_file, "--reward.name", "aesthetic")
    rewards = [" ".join(words) for words in lines if words[:2] == ["fault", "reward"]]
    assert len(rewards) == 2 and all("aesthetic needs" in text for text in rewards)
    assert "openai/clip-vit-large-patch14" in rewards[0] and "trl-lib/ddpo-aesthetic-predictor" in rewards[1]
    assert not [words for words in lines if "Traceback" in words]
    assert finding(lines, "ratio")[0] == "ok"  # one fault does not keep the rest from being looked at


def test_a_model_that_is_not_there_is_a_fault_and_the_reward_is_still_looked_at(
    recipe_file: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = said(capsys, 1, recipe_file, "--policy.model", "nobody/nothing")
    assert finding(lines, "model")[0] == "fault" and finding(lines, "reward")[0] == "ok"


def test_a_run_that_could_not_be_published_is_a_fault(
    recipe_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    options = ("--policy.model", "nobody/nothing", "--push.repo", "alice/animals", "--push.license", "mit")
    mark, text = finding(said(capsys, 1, recipe_file, *options), "push")
    assert mark == "fault" and "HF_TOKEN is not set" in text and "leave push.repo out" in text


def test_an_output_folder_that_cannot_be_written_is_a_fault(
    recipe_file: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    lines = said(capsys, 1, recipe_file, "--output_dir", tmp_path / "file" / "runs")
    assert any(words[:3] == ["fault", "run", "folder"] and "--output_dir" in after for words, after in pairwise(lines))


def test_more_than_this_machine_has_is_a_fault_that_names_role_and_resource(
    recipe_file: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = said(capsys, 1, recipe_file, "--samplers.resources", "{ sampler = 1 }", "--samplers.count", "2")
    mark, text = finding(lines, "samplers")
    assert mark == "fault" and text.startswith("0 of 2") and "lacks sampler (at most 0 free)" in text


def test_the_authentication_trap_is_reported_with_its_way_out_and_never_the_token(
    recipe_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert cli.main(["doctor", str(recipe_file)]) == 0
    captured = capsys.readouterr()
    assert "RAY_AUTH_MODE is not set, a token is in RAY_AUTH_TOKEN" in captured.out
    assert "→ export RAY_AUTH_MODE=token" in captured.out
    assert TOKEN not in captured.out + captured.err


def test_a_recipe_that_names_what_is_not_known_is_a_fault(recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    mark, text = finding(said(capsys, 1, recipe_file, "--reward.name", "beauty"), "recipe")
    assert mark == "fault" and "reward.name is 'beauty'" in text
