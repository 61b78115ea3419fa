"""Linters for other languages: those of the `dev` extra are installed, Debian's only under CI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLED = ("hadolint", "shellcheck", "yamllint", "check-jsonschema", "kubernetes-validate")
# Debian's packages, by their programs; .ci/run installs them.
PACKAGES = {"chromium": "chromium", "prometheus": "prometheus", "promtool": "prometheus"}


def tool(name: str) -> str:
    """Where a program is, beside this Python or on the PATH. One that the `dev` extra does not bring may lack: a skip.

    Under CI one that Debian has must be there, or nobody would see that a test has gone.
    """
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found and name in INSTALLED:
        raise FileNotFoundError(
            f"{name} is not installed: pip install --constraint constraints.txt --editable '.[dev]'"
        )
    if not found and name in PACKAGES and os.environ.get("CI"):
        raise FileNotFoundError(f"{name} is not installed: apt-get install --no-install-recommends {PACKAGES[name]}")
    return found or pytest.skip(f"{name} is not installed")


def complaint(name: str, *arguments: str | Path, text: str | None = None) -> str:
    """What a program says against the files that it is given, or the `text`; nothing where it ends with 0."""
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=text, timeout=120)
    return "" if done.returncode == 0 else done.stdout + done.stderr
