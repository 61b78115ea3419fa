"""Invalid input through the command line: one line with the value and the allowed values."""

import os
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.lease import Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none


@pytest.fixture
def recipe_file(tables: dict, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none(tables)))
    return path


def said(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What `ddpo` writes to stderr when it refuses; that it refuses with exit code 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "override, words",
    [
        (("--learner.lerning_rate", "1e-3"), ["learner.lerning_rate", "not a key"]),
        (("--policy.rank", "4"), ["policy.rank", "the keys here are", "'lora'"]),
        (("--learner.learning_rate", "-1"), ["learner.learning_rate is -1", "greater than 0"]),
        (("--sampling.eta", "0"), ["sampling.eta is 0", "greater than 0"]),
        (("--sampling.batch_size", "3"), ["= 6 images", "learner.batch_size × gradient_accumulation_steps = 4"]),
        (("--learner.micro_batch_size", "5"), ["= 16 transitions", "micro_batch_size = 5"]),
        (("--learner.world_size", "3"), ["= 4 images", "learner.world_size = 3 does not divide"]),
        (
            ("--learner.world_size", "4"),
            ["1 images × 4 trained steps = 4 transitions", "each of 4 ranks", "micro_batch_size = 8"],
        ),
        (
            ("--learner.world_size", "2"),
            ["learner.world_size is 2", "--serial has one process", "--learner.world_size 1"],
        ),
        (("--prompts.images_per_prompt", "3"), ["= 8 images", "images_per_prompt = 3"]),
        (("--policy.model", "./nowhere"), ["policy.model is './nowhere'", "model_index.json", "tiny_animals"]),
        (("--policy.name", "unstable"), ["policy.name is 'unstable'", "stable_diffusion"]),
        (("--reward.name", "beauty"), ["reward.name is 'beauty'", "jpeg_compressibility"]),
        (("--policy.lora.target_modules", '["nothing"]'), ["target_modules", "nothing"]),
        (("--max_policy_lag", "-1"), ["max_policy_lag is -1"]),
        (("--runtime.device", "cuda"), ["runtime.device is 'cuda'", "sees no GPU"]),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_its_key(
    recipe_file: Path, capsys: pytest.CaptureFixture, override: tuple[str, str], words: list[str]
) -> None:
    text = said(capsys, "train", recipe_file, "--serial", *override)
    assert all(word in text for word in words), text
    assert "Traceback" not in text


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture) -> None:
    assert "there is no recipe at nowhere.toml" in said(capsys, "train", "nowhere.toml")


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("\n \n", "has no prompts")])
def test_a_prompt_file_that_is_missing_or_empty(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: str | None, words: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_text(content)
    text = said(capsys, "train", recipe_file, "--serial", "--prompts.name", "file", "--prompts.path", prompts)
    assert words in text and str(prompts) in text


def wrong_shape(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    return np.zeros((len(images), 2))


def words(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[str]:
    return ["ok"] * len(images)


@pytest.mark.parametrize(
    "how, function, words",
    [
        (["--serial"], "wrong_shape", ["shape (2, 2)", "shape (2,)"]),
        (["--serial"], "words", ["<U2", "real number for each, of shape (2,)"]),
        pytest.param([], "wrong_shape", ["shape (2, 2)", "shape (2,)"], marks=pytest.mark.thorough),
    ],
)
def test_a_reward_that_returns_nonsense_ends_the_run_at_once(
    recipe_file: Path,
    capsys: pytest.CaptureFixture,
    how: list[str],
    function: str,
    words: list[str],
    request: pytest.FixtureRequest,
) -> None:
    if not how:
        request.getfixturevalue("cluster")
    path = f"tests.system.test_bad_input:{function}"
    text = said(capsys, "train", recipe_file, *how, "--reward.name", "function", "--reward.path", path)
    assert all(word in text for word in words), text


def test_a_reward_function_that_cannot_be_imported(recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    how = ("--serial", "--reward.name", "function", "--reward.path", "no_such_module:score")
    assert "there is no module 'no_such_module'" in said(capsys, "train", recipe_file, *how)


def test_a_run_folder_that_exists_is_refused_without_resume(recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", str(recipe_file), "--serial", "--rounds", "1"]) == 0
    text = said(capsys, "train", recipe_file, "--serial")
    assert "exists: resume it with --resume auto" in text


def test_a_run_folder_in_use_is_refused(recipe_file: Path, tables: dict, capsys: pytest.CaptureFixture) -> None:
    folder = RunFolder(Path(tables["output_dir"]) / "tiny")
    folder.create()
    with Lease(folder):
        text = said(capsys, "train", recipe_file, "--serial", "--resume", "auto")
    assert f"is in use by process {os.getpid()}" in text


def test_an_output_folder_that_cannot_be_written(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    text = said(capsys, "train", recipe_file, "--serial", "--output_dir", tmp_path / "file" / "runs")
    assert "cannot be written" in text and "output_dir" in text


def test_a_relative_output_folder_inside_a_submitted_job(
    recipe_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    text = said(capsys, "train", recipe_file, "--output_dir", "runs")
    assert "--output_dir" in text and "throw-away" in text


@pytest.mark.parametrize("verb", ["report", "sample"])
def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture, verb: str) -> None:
    arguments = ("report", tmp_path) if verb == "report" else ("sample", "--lora", tmp_path, "cat")
    assert "is no run's folder" in said(capsys, *arguments)
