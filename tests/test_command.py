"""The program `ddpo` starts fast, and ends well: interrupted in its first instant, and with threads that do not end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from ray_ddpo import cli

ROOT = Path(__file__).parents[1]
WITH_A_THREAD = """
import sys, threading, time
from ray_ddpo import cli
threading.Thread(target=time.sleep, args=(600,), name="my endless thread").start()
cli.THREADS_SECONDS = 0.1
cli.command()
"""


def python(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **({"RAY_DDPO_CACHE": str(folder / "cache")} if folder else {}),
    }
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_threads_of_the_users_code_do_not_keep_the_program_alive() -> None:
    ended = python("-c", WITH_A_THREAD, "plan", "no such recipe")
    assert ended.returncode == 2 and "there is no recipe at no such recipe" in ended.stderr
    assert "ends without waiting any longer for the threads ['my endless thread']" in ended.stderr


def test_an_early_interrupt_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_ddpo.deploy.commands.command_line.read", interrupted)
    assert cli.main(["plan", "x"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "ddpo: stopped\n"


def test_help_imports_nothing_that_takes_time() -> None:
    """`ddpo --help` takes about 0.1 s; with the recipe's tables or torch it would take 0.5 s or 2 s."""
    help_then_modules = "import sys, ray_ddpo.cli\ntry: ray_ddpo.cli.main(['--help'])\nfinally: print(*sys.modules)"
    printed = python("-c", help_then_modules).stdout
    loaded = printed.splitlines()[-1].split()
    assert "usage: ddpo" in printed and "ray_ddpo.deploy.commands.command_line" in loaded
    assert {"pydantic", "numpy", "torch", "ray", "ray_ddpo.common.recipe", "argcomplete"}.isdisjoint(loaded)


def test_plan_of_cached_sizes_does_not_import_diffusers(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    monkeypatch.setenv("RAY_DDPO_CACHE", str(tmp_path / "cache"))
    assert cli.main(["plan", str(tmp_path / "recipe.toml")]) == 0  # counts with diffusers, in this process
    first = capsys.readouterr().out.splitlines()
    plan_then_modules = "import sys, ray_ddpo.cli\nray_ddpo.cli.main(['plan', 'recipe.toml'])\nprint(*sys.modules)"
    second = python("-c", plan_then_modules, folder=tmp_path).stdout.splitlines()
    assert first == second[:-1] and "images per round" in first[0]
    assert {"diffusers", "peft"}.isdisjoint(second[-1].split())
