"""Hostile user code, prompts and files: one line that names them, and no results are lost."""

import shutil
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.learner.checkpoints.checkpoint import committed_checkpoints
from ray_ddpo.train import run_training
from tests.failure_page import assert_documented
from tests.rounds import components_with

MODULE = """
class Own(BaseException):
    pass

def raises_own(images, prompts, metadata):
    raise Own("my own base")

def exits(generator):
    raise SystemExit(3)

def half_a_character(generator):
    return "a \\ud800 cat"
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module whose functions do all of that."""
    (tmp_path / "hostile_code.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "hostile_code"


def printed(tables: dict, folder: Path, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Run `ddpo train --serial`; its exit code and what it wrote to standard error."""
    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none(tables)))
    capfd.readouterr()
    exit_code = cli.main(["train", str(file), "--serial", *options])
    return exit_code, capfd.readouterr().err


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("situation", "changes"),
    [
        ("a reward raises an exception of its own kind", {"reward": {"name": "function", "path": "raises_own"}}),
        ("a prompt function ends the process", {"prompts": {"name": "function", "path": "exits"}}),
        ("a prompt is no text", {"prompts": {"name": "function", "path": "half_a_character"}}),
    ],
)
def test_what_a_users_code_does_is_one_line(
    situation: str, changes: dict, hostile: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = {key: {**table, "path": f"{hostile}:{table['path']}"} for key, table in changes.items()}
    assert_documented(situation, *printed({**tables, **named}, tmp_path, capfd))


def test_a_run_that_lost_its_recipe_or_checkpoints_is_not_written_over(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_training(components_with(tables, rounds=1).recipe, serial=True)
    folder = RunFolder(Recipe.parse(tables).run_path())
    kept = Path(shutil.copytree(folder.location, tmp_path / "kept"))
    (name,) = committed_checkpoints(folder.checkpoints)
    next((Path(folder.checkpoints.location) / name).glob("weights-*")).write_bytes(b"")
    ended = printed(tables, tmp_path, capfd, "--resume", "auto")
    assert_documented("every checkpoint of a run is damaged", *ended)
    shutil.rmtree(folder.location)
    shutil.copytree(kept, folder.location)
    (Path(folder.location) / folder.recipe).unlink()
    assert_documented("a run's folder has lost its recipe", *printed(tables, tmp_path, capfd, "--resume", "auto"))
    assert committed_checkpoints(folder.checkpoints) == [name]


def test_a_long_or_control_message_does_not_reach_the_terminal_unchanged() -> None:
    shown = cli._without_passwords("\x1b[31mred\u202e " + "x" * 5_000_000 + "\nsecond line")
    assert len(shown) < 3000 and "\x1b" not in shown and "\u202e" not in shown and shown.endswith("…\nsecond line")


def test_a_recipe_nested_too_deeply_is_not_toml() -> None:
    with pytest.raises(ValueError, match="the recipe deep.toml is not TOML"):
        Recipe.from_toml("x = " + "[" * 20_000, "deep.toml", [])


def test_a_prompt_of_half_a_character_is_refused_and_others_pass() -> None:
    assert Prompt("Ein Füchschen 🦊").text
    with pytest.raises(ValueError, match="is no text that can be encoded"):
        Prompt("a \ud800 cat")
