"""submit.sh: its call of `ray job submit`, recorded by a stand-in for ray, and its refusals."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.command_line import read

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "cluster" / "submit.sh"
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy" / "recipes").rglob("*.toml"))
DEMO = "deploy/recipes/demo.toml"
STAND_IN = """#!/bin/sh
printf '%s\\0' "$@" > "$RECORD/arguments"
printf '%s\\0' "$PWD" "$RAY_AUTH_MODE" > "$RECORD/surroundings"
exit "$STAND_IN_EXIT"
"""


@dataclass(frozen=True)
class Submitted:
    """What became of one call of the script."""

    returncode: int
    stderr: str
    arguments: list[str]  # ray's; none: it was not called
    surroundings: list[str]  # its working directory and RAY_AUTH_MODE

    def option(self, name: str) -> str:
        return self.arguments[self.arguments.index(name) + 1]

    @property
    def entrypoint(self) -> list[str]:
        return self.arguments[self.arguments.index("--") + 1 :]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    (tmp_path / "ray").write_text(STAND_IN)
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "python").write_text("#!/bin/sh\n")  # adds nothing up: that takes a moment, and has tests of its own
    (tmp_path / "python").chmod(0o755)
    for name in ("bash", "date", "dirname", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def submit(record: Path, *words: str, exit_code: int = 0, **environment: str) -> Submitted:
    surroundings = {"PATH": str(record), "RECORD": str(record), "STAND_IN_EXIT": str(exit_code), **environment}
    done = subprocess.run(["bash", SCRIPT, *words], cwd="/", env=surroundings, capture_output=True, text=True)
    read = [(record / name).read_text().split("\0")[:-1] if (record / name).exists() else [] for name in RECORDED]
    return Submitted(done.returncode, done.stderr, *read)


RECORDED = ("arguments", "surroundings")


def test_a_run_is_submitted_from_the_root_with_its_name_a_grace_and_resume(record: Path) -> None:
    submitted = submit(record, DEMO, "s3://bucket/runs", "--learner.num_gpus", "0.9")
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.arguments[:2] == ["job", "submit"]
    assert submitted.surroundings == [str(ROOT), "token"]
    assert submitted.option("--working-dir") == "."
    assert re.fullmatch(r"demo-\d{8}-\d{6}", submitted.option("--submission-id"))
    assert metadata_of(submitted) == {
        "job_name": "demo",
        "rounds": "28",
        "folder": "s3://bucket/runs/demo",
        "report": "s3://bucket/runs/demo/report/report.html",
    }
    assert "--entrypoint-resources" not in submitted.arguments
    assert json.loads(submitted.option("--runtime-env-json")) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    train = ["python", "-m", "ray_ddpo", "train", DEMO, "--output_dir", "s3://bucket/runs", "--resume", "auto"]
    assert submitted.entrypoint == [*train, "--learner.num_gpus", "0.9"]


def metadata_of(submitted: Submitted) -> dict[str, str]:
    return json.loads(submitted.option("--metadata-json"))


def test_what_is_submitted_is_a_command_that_ddpo_takes(record: Path) -> None:
    words = submit(record, DEMO, "/shared/runs", "--learner.num_gpus", "0.9").entrypoint
    options = read(words[3:])
    assert options.resume == "auto"
    recipe = Recipe.load(ROOT / options.recipe, options.overrides)
    assert (recipe.run_path(), recipe.learner.num_gpus) == ("/shared/runs/demo", 0.9)


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_metadata_is_what_the_recipe_says(recipe: str, record: Path) -> None:
    metadata, loaded = metadata_of(submit(record, recipe, "/shared/runs/")), Recipe.load(ROOT / recipe)
    assert (metadata["job_name"], metadata["rounds"]) == (loaded.name, str(loaded.rounds))
    assert metadata["folder"] == f"/shared/runs/{loaded.name}"


@pytest.mark.parametrize("override", [["--name", "mine", "--rounds", "3"], ["--name=mine", "--rounds=3"]], ids=" ".join)
def test_what_is_overridden_is_so_in_the_metadata(override: list[str], record: Path) -> None:
    submitted = submit(record, DEMO, "/shared/runs", *override)
    metadata = metadata_of(submitted)
    assert (metadata["job_name"], metadata["rounds"], metadata["folder"]) == ("mine", "3", "/shared/runs/mine")
    assert submitted.option("--submission-id").startswith("mine-")


def test_the_driver_has_its_place_where_the_environment_says(record: Path) -> None:
    submitted = submit(record, DEMO, "/shared/runs", DRIVER_RESOURCES='{"driver": 1}')
    assert json.loads(submitted.option("--entrypoint-resources")) == {"driver": 1}


def test_the_exit_code_is_that_of_ray(record: Path) -> None:
    assert submit(record, DEMO, "/shared/runs", exit_code=1).returncode == 1


def test_a_mode_of_authentication_that_is_set_stays(record: Path) -> None:
    assert submit(record, DEMO, "/shared/runs", RAY_AUTH_MODE="disabled").surroundings[1] == "disabled"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage"),
        ([DEMO], "usage"),
        (["deploy/recipes/none.toml", "/shared/runs"], "no recipe at deploy/recipes/none.toml"),
        ([str(ROOT / DEMO), "/shared/runs"], "must lie inside"),
        ([DEMO, "runs"], "OUTPUT_DIR is runs"),
        ([DEMO, "./runs"], "OUTPUT_DIR is ./runs"),
        ([DEMO, "/shared/runs", "--name", 'a", "b": "c'], "the run's name is"),
        (["pyproject.toml", "/shared/runs"], "the run's name is ''"),
        ([DEMO, '/shared/"runs'], "has a quote"),
        ([DEMO, "/shared/runs", "--rounds", '3"'], "has a quote"),
    ],
)
def test_what_would_go_wrong_is_refused_before_anything_is_uploaded(words: list[str], said: str, record: Path) -> None:
    refused = submit(record, *words)
    assert (refused.returncode, refused.arguments) == (2, [])
    assert refused.stderr.startswith("submit.sh: ") and said in refused.stderr


def test_a_missing_ray_is_named(record: Path) -> None:
    (record / "ray").unlink()
    assert "no ray on the PATH" in submit(record, DEMO, "/shared/runs").stderr


def test_it_can_be_run() -> None:
    assert os.access(SCRIPT, os.X_OK)
