"""Test `ddpo … | head -1`: every verb ends quietly when its reader closes the pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.deploy.commands.command_line import parser

ROOT = Path(__file__).parents[1]
QUIET = (0, cli.NOBODY_READS)


def unread(folder: Path, *words: str, stderr_too: bool = False) -> tuple[int, str]:
    """Run `ddpo` with a closed reader. Return its exit code and standard error."""
    command = [sys.executable, "-m", "ray_ddpo", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    errors = subprocess.STDOUT if stderr_too else subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout
        process.stdout.close()
        complaint = process.stderr.read().decode() if process.stderr else ""
        return process.wait(timeout=120), complaint


def verbs() -> list[str]:
    (action,) = [action for action in parser()._actions if action.dest == "verb"]
    assert isinstance(action.choices, dict)
    return list(action.choices)


def test_every_verb_is_quiet_if_its_help_has_no_reader(tmp_path: Path) -> None:
    assert {"train", "plan", "status", "report"} <= set(verbs())
    ended = {verb: unread(tmp_path, verb, "--help") for verb in ["--help", *verbs()]}
    assert {verb: how for verb, how in ended.items() if how[0] not in QUIET or how[1]} == {}


@pytest.fixture
def recipe_file(tables: dict, tmp_path: Path) -> str:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(without_none(tables)))
    return "recipe.toml"


@pytest.mark.thorough
def test_output_without_a_reader_is_no_error(tmp_path: Path, recipe_file: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.storage.write("recipe.toml", (tmp_path / recipe_file).read_bytes())
    assert unread(tmp_path, "plan", recipe_file) == (cli.NOBODY_READS, "")
    assert unread(tmp_path, "status", "run", "--json") == (cli.NOBODY_READS, "")
    assert unread(tmp_path, "status", "nowhere", stderr_too=True)[0] == cli.NOBODY_READS


@pytest.mark.thorough
def test_a_run_whose_output_has_no_reader_closes_its_folder(tmp_path: Path, recipe_file: str) -> None:
    code, complaint = unread(tmp_path, "train", recipe_file, "--serial", "--output_dir", "runs")
    assert code in QUIET and "Traceback" not in complaint
    assert (tmp_path / "runs/tiny/recipe.toml").exists() and not (tmp_path / "runs/tiny/lease.json").exists()


def test_another_broken_pipe_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> None:
        raise BrokenPipeError("a reward service hung up")

    monkeypatch.setitem(cli.RUN, "plan", broken)
    with pytest.raises(BrokenPipeError, match="hung up"):
        cli.main(["plan", "recipe.toml"])
