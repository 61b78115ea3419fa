"""Sampling settings are printed and saved with a result, and no result overwrites another."""

import json
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import run_training
from tests.failure_page import assert_documented

STEPS, GUIDANCE = ("--sampling.num_steps", "6"), ("--sampling.guidance_scale", "1")


@pytest.fixture
def run(tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.parse({**tables, "rounds": 1, "evaluation": {"images": 2, "batch_size": 2, "seed": 7}})
    run_training(recipe, serial=True)
    return Path(recipe.run_path())


def test_settings_are_printed_and_kept_and_differences_are_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), *STEPS, *GUIDANCE]) == 0
    printed = capsys.readouterr().out
    assert "sampled with 6 steps, guidance 1, eta 1, 16 × 16 pixels, float32, 2 seeds of evaluation.seed 7" in printed
    lines = [
        f"sampling.guidance_scale is 1.0 here, and was 3.0 in the training of {run}",
        f"sampling.num_steps is 6 here, and was 4 in the training of {run}",
    ]
    assert all(line in printed.splitlines() for line in lines)
    first = json.loads((run / "evaluation/evaluation.json").read_text())
    assert first["differs_from_training"] == lines
    settings = first["settings"]
    assert (settings["sampling.num_steps"], settings["sampling.guidance_scale"]) == (6, 1.0)
    assert (settings["width"], settings["height"], settings["policy.dtype"]) == (16, 16, "float32")
    assert settings["evaluation.seed"] == 7 and len(settings["seeds"]) == settings["images"] == 2

    kept = (run / "evaluation/evaluation.json").read_bytes()
    assert cli.main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "in the training of" not in printed and str(run / "evaluation-2/evaluation.json") in printed
    assert json.loads((run / "evaluation-2/evaluation.json").read_text())["differs_from_training"] == []
    assert (run / "evaluation/evaluation.json").read_bytes() == kept

    code = cli.main(["evaluate", str(run), "--output", str(run / "evaluation"), *STEPS])
    assert_documented("an evaluation is written into a folder with another one", code, capsys.readouterr().err)
    assert (run / "evaluation/evaluation.json").read_bytes() == kept


def test_a_run_from_before_keys_that_change_no_image_is_no_different(run: Path, capsys: pytest.CaptureFixture) -> None:
    lines = (run / "recipe.toml").read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("kl_reward", "deterministic", "backprop_steps"))]
    assert len(older) < len(lines)
    (run / "recipe.toml").write_text("".join(older))
    assert cli.main(["evaluate", str(run)]) == 0
    assert "in the training of" not in capsys.readouterr().out


def test_report_and_sample_report_differing_settings_too(run: Path, capsys: pytest.CaptureFixture) -> None:
    differs = f"sampling.num_steps is 6 here, and was 4 in the training of {run}"
    capsys.readouterr()
    assert cli.main(["report", str(run), *STEPS]) == 0
    assert differs in capsys.readouterr().out.splitlines()
    summary = json.loads((run / "report/summary.json").read_text())
    assert summary["settings"]["sampling.num_steps"] == 6 and summary["differs_from_training"] == [differs]
    assert cli.main(["sample", "--lora", f"{run}/lora", "--recipe", f"{run}/recipe.toml", "fox", *STEPS]) == 0
    assert differs.replace(str(run), f"{run}/lora") in capsys.readouterr().err.splitlines()
    assert cli.main(["sample", "--lora", str(run), "fox"]) == 0
    said = capsys.readouterr().err
    assert "in the training of" not in said and f"{run}/samples/000-fox-seed0.png was there and is replaced" in said


def test_an_evaluation_takes_fewer_steps_than_the_training_propagates_gradients_through(
    tables: dict, capsys: pytest.CaptureFixture
) -> None:
    sampling = {**tables["sampling"], "backprop_steps": [1, 3]}
    tables |= {"rounds": 1, "sampling": sampling, "reward": {"name": "brightness"}, "algorithm": {"name": "draft"}}
    tables["learner"] |= {"micro_batch_size": 4}
    recipe = Recipe.parse({**tables, "evaluation": {"images": 2, "batch_size": 2}})
    run_training(recipe, serial=True)
    few = ("--sampling.num_steps", "2")
    assert cli.main(["evaluate", recipe.run_path(), *few]) == 0
    assert "sampled with 2 steps" in capsys.readouterr().out
    settings = json.loads((Path(recipe.run_path()) / "evaluation/evaluation.json").read_text())["settings"]
    assert settings["sampling.num_steps"] == 2 and "sampling.backprop_steps" not in settings
    assert cli.main(["train", f"{recipe.run_path()}/recipe.toml", "--serial", "--name", "other", *few]) == 2
    assert "sampling.backprop_steps is [1, 3] and sampling.num_steps 2" in capsys.readouterr().err


def test_the_weights_of_a_run_on_gradients_are_evaluated_by_a_reward_that_has_none(
    tables: dict, capsys: pytest.CaptureFixture
) -> None:
    tables |= {"rounds": 1, "reward": {"name": "brightness"}, "algorithm": {"name": "draft"}}
    tables["sampling"] |= {"backprop_steps": 1}
    tables["learner"] |= {"micro_batch_size": 4}
    recipe = Recipe.parse({**tables, "evaluation": {"images": 2, "batch_size": 2}})
    run_training(recipe, serial=True)
    other = ("--reward.name", "jpeg_compressibility")
    assert cli.main(["evaluate", recipe.run_path(), *other]) == 0, capsys.readouterr().err
    assert "jpeg_compressibility" in capsys.readouterr().out
    assert cli.main(["train", f"{recipe.run_path()}/recipe.toml", "--serial", "--name", "other", *other]) == 2
    assert "which needs the gradient of the reward" in capsys.readouterr().err
