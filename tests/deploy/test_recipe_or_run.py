"""A recipe that is given in the place of a run, a run in the place of a recipe: every verb says which of them it needs."""

import re
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from tests.accepted_page import assert_refused

OF_RECIPES = ("train", "plan", "doctor", "serve-reward")
OF_RUNS = {
    "report": (),
    "status": (),
    "scale": ("--samplers", "2"),
    "replay": ("--round", "0"),
    "push": ("owner/name",),
}


@pytest.fixture
def run(tables: dict, tmp_path: Path) -> Path:
    """What tells a run from another folder, and files that are easily taken for its recipe."""
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(tables))
    folder = tmp_path / "runs" / "tiny"
    (folder / "lora").mkdir(parents=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(tables))
    (folder / "base.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"round": 0' + ', "x": 1' * 5000 + "}\n")
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"__metadata__":')
    return folder


def refused(capsys: pytest.CaptureFixture, *typed: object) -> str:
    code = cli.main([str(word) for word in typed])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and len(said) < 1000, said
    return said


@pytest.mark.parametrize("verb", OF_RECIPES)
def test_a_verb_that_takes_a_recipe_names_the_one_in_a_folder(
    verb: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refused(capsys, verb, run)
    assert f"give the recipe in it, {run / 'recipe.toml'}" in said
    assert_refused("a run's folder in the place of a recipe", re.sub("ddpo [a-z-]+", "ddpo train", said))
    assert f"there is no recipe at {run / 'lora'}, it is a folder" in refused(capsys, verb, run / "lora")
    file = run / "lora" / "pytorch_lora_weights.safetensors"
    assert f"{file} is no recipe, it is no text in UTF-8" in refused(capsys, verb, file)
    assert "metrics.jsonl is not TOML" in refused(capsys, verb, run / "metrics.jsonl")


@pytest.mark.parametrize("verb", OF_RUNS)
def test_a_verb_that_takes_a_run_names_the_one_that_is_meant(
    verb: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    for place in (run / "recipe.toml", run / "lora", run / "lora" / "pytorch_lora_weights.safetensors"):
        assert f"{place} is no run's folder: it is inside one: give {run}\n" in refused(
            capsys, verb, place, *OF_RUNS[verb]
        )
    said = refused(capsys, verb, run.parents[1] / "mine.toml", *OF_RUNS[verb])
    assert_refused("a recipe in the place of a run's folder", re.sub("ddpo [a-z]+", "ddpo report", said))
    said = refused(capsys, verb, run.parent, *OF_RUNS[verb])
    assert f"it has no recipe.toml, but holds runs, such as {run}: give one of them" in said


def test_a_recipe_in_the_place_of_weights_is_refused_by_name(
    tiny_model: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = run.parents[1] / "mine.toml"
    for typed in (("sample", "cat", "--lora"), ("evaluate",)):
        assert f"weights are needed: give the run's folder, {run}\n" in refused(capsys, *typed, run / "recipe.toml")
        said = refused(capsys, *typed, recipe)
        assert_refused("a recipe in the place of weights", re.sub("ddpo [a-z]+", "ddpo evaluate", said))
        assert f"such as --recipe {run}/recipe.toml" in refused(capsys, *typed, run / "lora")
        assert "weights are needed" in refused(capsys, *typed, recipe, "--recipe", recipe)
        said = refused(capsys, *typed, tiny_model, "--recipe", recipe)
        assert_refused("a whole pipeline in the place of weights", re.sub("ddpo [a-z]+", "ddpo evaluate", said))
        said = refused(capsys, *typed, tiny_model / "unet", "--recipe", recipe, "--output", recipe)
        assert f"--output is '{recipe}', and {recipe} is a file: give a folder" in said
    output = run.parents[1] / "new.safetensors"
    assert "mine.toml is no LoRA file: its name must end in .safetensors" in refused(capsys, "export", recipe, output)
    said = refused(capsys, "train", recipe, "--serial", "--name", "other", "--from", run / "lora")
    assert f"it is inside one: give {run}\n" in said
