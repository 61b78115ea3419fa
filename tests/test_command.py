"""Test the start and end of the program `ddpo`: an early interrupt, and threads that do not end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ddpo import cli

ROOT = Path(__file__).parents[1]
WITH_A_THREAD = """
import sys, threading, time
from ray_ddpo import cli
threading.Thread(target=time.sleep, args=(600,), name="my endless thread").start()
cli.THREADS_SECONDS = 0.1
cli.command()
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_a_users_threads_do_not_keep_the_program_alive() -> None:
    ended = python("-c", WITH_A_THREAD, "plan", "no such recipe")
    assert ended.returncode == 2 and "there is no recipe at no such recipe" in ended.stderr
    assert "ends without waiting any longer for the threads ['my endless thread']" in ended.stderr


def test_an_early_interrupt_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_ddpo.deploy.commands.command_line.read", interrupted)
    assert cli.main(["plan", "x"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "ddpo: stopped\n"


def test_the_command_is_importable_before_slow_imports() -> None:
    loaded = python(
        "-c", "import ray_ddpo.cli, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    ).stdout
    assert "'ray_ddpo'" in loaded
    for slow in ("pydantic", "numpy", "torch"):
        assert f"'{slow}'" not in loaded
