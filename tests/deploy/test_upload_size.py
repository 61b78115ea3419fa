"""The size of a job's upload, added up as Ray does, and refused in one line if Ray would answer 413."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
from ray._private.runtime_env.packaging import create_package

from ray_ddpo.deploy.cluster.upload_size import LIMIT, NEVER, too_large
from tests.failure_page import assert_documented

ROOT = Path(__file__).parents[2]
WHOLE = 600 * 2**20


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with a sparse file of 600 MB, and a stand-in for ray that must not be called."""
    clone = tmp_path / "clone"
    (clone / "deploy" / "cluster").mkdir(parents=True)
    for name in ("submit.sh", "upload_size.py"):
        shutil.copy(ROOT / "deploy" / "cluster" / name, clone / "deploy" / "cluster" / name)
    (clone / "demo.toml").write_text('name = "demo"\nrounds = 1\n')
    (clone / "weights").mkdir()
    with (clone / "weights" / "model.safetensors").open("wb") as file:
        file.truncate(WHOLE)
    (clone / "bin").mkdir()
    for name, script in (("ray", "echo called"), ("python", f'exec {sys.executable} "$@"')):
        (clone / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (clone / "bin" / name).chmod(0o755)
    return clone


def submit(clone: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{clone}/bin:/usr/bin:/bin"}
    command = ["bash", "deploy/cluster/submit.sh", "demo.toml", "/shared/runs"]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=60)


def test_an_upload_over_rays_limit_is_refused_with_the_largest_files(clone: Path) -> None:
    done = submit(clone)
    assert_documented("a large file inside the clone, with `submit.sh`", done.returncode, done.stdout + done.stderr)
    assert "weights/model.safetensors (600 MiB)" in done.stderr and "called" not in done.stdout


@pytest.mark.parametrize("file", [".gitignore", ".rayignore", "weights/.rayignore"])
def test_a_file_that_is_ignored_is_not_counted(clone: Path, file: str) -> None:
    (clone / file).write_text("*.safetensors\n")
    assert submit(clone).stdout == "called\n"


def test_the_limit_and_what_is_never_uploaded_are_rays() -> None:
    assert (LIMIT, NEVER) == (DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_DEFAULT_EXCLUDES)


def test_the_files_are_those_that_ray_packs_at_about_their_size(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, size in (("a.bin", 3000), ("inner/b.bin", 2000), ("inner/c.log", 10**6), ("kept/c.log", 1000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    (folder / ".gitignore").write_text("/inner/*.log\n")
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True)
    packed = (tmp_path / "package.zip").stat().st_size
    assert too_large(folder, packed + 1) is None
    assert too_large(folder, 6000) is not None
