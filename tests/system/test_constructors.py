"""A role that cannot start ends the run in one line on Ray and in one process; dead actors are replaced."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.failure_page import assert_documented

LONGEST_SECONDS = 90.0  # three times what is promised
OWN = "tests.failing_parts:OwnPolicy"
Changes = Callable[[dict, Path], dict]


def reward(path: str) -> Changes:
    return lambda tables, folder: {"reward": {"name": "function", "path": path}}


def scorer(path: str) -> Changes:
    table = {"name": "function", "path": path}
    return lambda tables, folder: {"evaluation": {"every": 1, "images": 2, "scorers": [table]}}


def damaged(part: str) -> Changes:
    def changes(tables: dict, folder: Path) -> dict:
        model = Path(shutil.copytree(tables["policy"]["model"], folder / "model"))
        (weights,) = (model / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        return {"policy": {**tables["policy"], "model": str(model)}}

    return changes


def policy(**keys: Any) -> Changes:
    return lambda tables, folder: {"policy": {**tables["policy"], **keys}}


CASES: dict[str, tuple[str, Changes]] = {
    "module": ("a reward's module does not exist", reward("no_such_module:score")),
    "function": ("a reward's module has no such function", reward("tests.failing_parts:no_such_function")),
    "import": ("a reward raises an error while it is loaded", reward("tests.failing_import:score")),
    "scorer": ("a scorer raises an error while it is loaded", scorer("tests.failing_import:score")),
    "unet": ("a file of the model is damaged", damaged("unet")),
    "decoder": ("a file of the model is damaged", damaged("vae")),
    "text encoder": ("a file of the model is damaged", damaged("text_encoder")),
    "hub": ("the model is to come from the hub, without network", policy(model="alice/nothing")),
    "sampler": ("a sampler runs out of memory while it is loading", policy(name=OWN, fails={"sampler": "memory"})),
    "memory": ("the learner runs out of memory while it is loading", policy(name=OWN, fails={"learner": "memory"})),
}
IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=3))
ON_RAY = ("module", "text encoder", "memory")  # one of each kind of role; the others take their turn in `thorough`


def printed(
    changes: Changes, tables: dict, folder: Path, capfd: pytest.CaptureFixture, *options: str
) -> tuple[int, str, str]:
    """Run `ddpo train`; its exit code and what it has written to stdout and stderr."""
    file = folder / "recipe.toml"
    short = {"prompts": {"name": "texts", "texts": ["cat", "dog"]}}  # of longer ones the tiny model's start tells
    if not file.exists():
        file.write_text(tomli_w.dumps(without_none({**tables, **short, **changes(tables, folder)})))
    capfd.readouterr()
    exit_code = cli.main(["train", str(file), *options])
    return exit_code, *capfd.readouterr()


@pytest.mark.parametrize("case", CASES)
def test_a_role_that_cannot_start_is_refused_in_one_line(
    case: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    situation, changes = CASES[case]
    exit_code, out, err = printed(changes, tables, tmp_path, capfd, "--serial")
    assert_documented(situation, exit_code, err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.system if case in ON_RAY else IN_TURNS) for case in CASES]
)
def test_on_ray_the_same_role_ends_the_run_in_the_same_line_and_soon(
    case: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, cluster: None
) -> None:
    situation, changes = CASES[case]
    in_one_process = printed(changes, tables, tmp_path, capfd, "--serial")
    started = time.monotonic()
    on_ray = printed(changes, tables, tmp_path, capfd)
    seconds = time.monotonic() - started
    assert_documented(situation, on_ray[0], on_ray[2])
    assert on_ray[0] == in_one_process[0] and on_ray[2] == in_one_process[2], "nothing of Ray's beside it"
    assert seconds < LONGEST_SECONDS


@pytest.mark.system
def test_a_rank_that_cannot_start_ends_the_run_by_its_name(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, cluster: None
) -> None:
    (tmp_path / "once").mkdir()
    tables["learner"] |= {"world_size": 2, "micro_batch_size": 4}
    changes = policy(name=OWN, fails={"learner": "memory"}, once=str(tmp_path / "once"))
    exit_code, _, err = printed(changes, tables, tmp_path, capfd)
    assert_documented("a rank of the learner cannot start", exit_code, err)
    assert err.count("\n") == 1


@pytest.mark.thorough
@pytest.mark.parametrize("role", ["sampler", "learner"])
def test_a_role_that_is_killed_whenever_it_loads_ends_the_run_soon(
    role: str, tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, cluster: None
) -> None:
    exit_code, _, err = printed(policy(name=OWN, fails={role: "kill"}), tables, tmp_path, capfd)
    assert_documented("a process dies whenever it loads", exit_code, err)
    assert err.count(f"{role}-") == 3, "a line for each death"


@pytest.mark.thorough
def test_deaths_over_the_budget_end_the_run(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, cluster: None
) -> None:
    tables["runtime"] = {"max_restarts": 0}
    exit_code, _, err = printed(policy(name=OWN, fails={"sampler": "kill"}), tables, tmp_path, capfd)
    assert_documented(
        "processes die more often than `runtime.max_restarts` allows before a round is done", exit_code, err
    )
    assert err.count("sampler-") == 1
