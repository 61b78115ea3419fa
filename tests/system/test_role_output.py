"""Output of roles on a cluster of several nodes, causes of deaths, and visible GPUs, all from one run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.failure_page import assert_documented
from tests.system.drivers import Driver
from tests.system.nodes import local_nodes

LOADS = re.compile(r"^\[(.+?)\] process (\d+) loads the (\w+)'s policy and sees GPUs (.*)$", re.MULTILINE)
# What the doctor's tasks see where an actor of a role would be, which it starts without the actors' own code.
DOCTORS = """
import os, sys, ray
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.doctor.doctor import _at_cluster
ray.init(log_to_driver=False)
recipe = Recipe.load(sys.argv[1])
print([_at_cluster(recipe)(table, os.getenv, "CUDA_VISIBLE_DEVICES") for table in (recipe.samplers, recipe.learner)])
"""
FUNCTION = {"name": "function", "path": "tests.failing_parts:aborts_once"}


def eventful(tables: dict, folder: Path) -> Recipe:
    """Return a recipe in which a sampler, a rank and a reward worker die once each; roles live on two nodes."""
    (folder / "once").mkdir()
    prompts = folder / "prompts.txt"
    prompts.write_text(f"cat\n{folder / 'aborted'}\n")
    fails = {"sampler": "exit", "learner": "kill"}
    changes = {
        "name": "eventful",
        "policy": {
            **tables["policy"],
            "name": "tests.failing_parts:OwnPolicy",
            "fails": fails,
            "once": str(folder / "once"),
        },
        "prompts": {"name": "file", "path": str(prompts)},
        "reward": FUNCTION,
        "evaluation": {"every": 2, "images": 2, "prompts": ["cat"], "scorers": [{**FUNCTION, "label": "looked_at"}]},
        "learner": {**tables["learner"], "world_size": 2, "micro_batch_size": 4, "num_gpus": 1},
        "samplers": {"resources": {"acting": 1}},
    }
    return Recipe.parse({**tables, **changes})


@pytest.mark.system
def test_what_roles_say_and_how_they_die_is_on_the_terminal_once(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = eventful(tables, tmp_path)
    with local_nodes() as nodes:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        nodes.add_node(num_cpus=4, num_gpus=2)
        nodes.add_node(num_cpus=3, num_gpus=0, resources={"acting": 1})
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setenv("PYTHONPATH", os.getcwd())
        driver = Driver(recipe, tmp_path, address=nodes.address)
        assert driver.ended() == 0, driver.said()
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        command = [sys.executable, "-c", DOCTORS, str(tmp_path / "eventful.toml")]
        doctors = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = driver.said()
    assert_documented("a worker's process dies", 0, said)
    assert "sampler-0 died while it was loading: exit code 7 (os._exit); another is started in its place" in said
    assert re.search(
        r"^reward-worker-0 died.*: SIGABRT in .*tests/failing_parts.py:\d+; another is started", said, re.M
    )
    assert_documented("a process of the learner dies", 0, said)
    assert re.search(r"^learner-[01] died while it was loading: its process was killed \(SIGKILL\)", said, re.M)

    loads = LOADS.findall(said)
    assert len(loads) == len({process for _, process, _, _ in loads}), "each line once"
    gpus = {label: visible for label, _, _, visible in loads}
    assert gpus["sampler-0"] == gpus["sampler-1"] == "", "who asks for no GPU sees none"
    assert {gpus["learner-2"], gpus["learner-3"]} == {"0", "1"}
    assert doctors.stdout.strip() in ("['', '0']", "['', '1']"), doctors.stdout + doctors.stderr
    for label in ("sampler-1", "learner-2"):
        assert re.search(rf"^\[{label}\] WARNING:root:process \d+ warns$", said, re.M), "logging too"
    for label in ("reward-worker-1", "scorer-0"):
        assert re.search(rf"^\[{label}\] process \d+ scores$", said, re.M)
    assert said.count("[reward-worker-0] last words") == 1
    assert "raylet" not in said and "SIGABRT received" not in said and "Traceback" not in said, said

    log = (Path(recipe.run_path()) / "logs" / "reward-worker-0.log").read_text()
    assert "last words" in log and "Fatal Python error: Aborted" in log
