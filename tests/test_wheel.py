"""The wheel holds `ray_ddpo` alone and works beside a package that has our folders' names at its own top level."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLASHING = ("common", "actors", "learner", "deploy", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from a copy of the clone, for setuptools leaves a build/ beside what it builds."""
    folder, clone = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("clone")
    for name in ("ray_ddpo", "common", "actors", "learner", "deploy"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(clone)]
    subprocess.run(command, check=True, timeout=600)
    return next(folder.glob("*.whl"))


@pytest.mark.thorough
def test_the_wheel_has_one_top_level_name_and_the_files_that_programs_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (name for name in names if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["ray_ddpo"]
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ray_ddpo"}
    needed = (
        "py.typed",
        "deploy/recipes/demo.toml",
        "common/prompt_lists/animals.txt",
        "common/tiny_words/transformer/diffusion_pytorch_model.safetensors",
        "deploy/commands/report/page.js",
    )
    assert {f"ray_ddpo/{name}" for name in needed} <= set(names)


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_it_works_in_an_empty_folder_beside_packages_of_our_folders_names(wheel: Path, tmp_path: Path) -> None:
    installed, other, empty = tmp_path / "installed", tmp_path / "other", tmp_path / "empty"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True, timeout=600)
    other.mkdir()
    empty.mkdir()
    for name in CLASHING:
        (other / f"{name}.py").write_text(f"NAME = 'another {name}'\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(other), str(installed)])}
    check = (
        "import common, train, ray_ddpo.common.schedule, ray_ddpo.train\n"
        "assert (common.NAME, train.NAME) == ('another common', 'another train')\n"
        f"assert ray_ddpo.__file__.startswith({str(installed)!r}), ray_ddpo.__file__"
    )
    subprocess.run([sys.executable, "-c", check], cwd=empty, env=environment, check=True, timeout=300)
    words = ["demo", "--rounds", "1", "--sampling.num_steps", "4", "--sampling.batches_per_round", "1", "--serial"]
    train = [sys.executable, "-m", "ray_ddpo", "train", *words]
    done = subprocess.run(train, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (empty / "runs" / "demo" / "lora" / "pytorch_lora_weights.safetensors").is_file()
