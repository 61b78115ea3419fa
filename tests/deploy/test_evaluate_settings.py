"""How the images of a result were sampled is said and kept with it, and no result is written over another."""

import json
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import train
from tests.failure_page import assert_documented

STEPS, GUIDANCE = ("--sampling.num_steps", "6"), ("--sampling.guidance_scale", "1")


@pytest.fixture
def run(tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.parse({**tables, "rounds": 1, "evaluation": {"images": 2, "batch_size": 2, "seed": 7}})
    train(recipe, serial=True)
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
