"""ddpo doctor on real clusters: missing resources, leftover actors, and a cluster that refuses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.system.nodes import local_nodes


@pytest.fixture
def recipe_file(tables: dict, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(without_none(tables)))
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster with one node: four CPUs, and two of what samplers may ask for."""
    with local_nodes() as nodes:
        nodes.add_node(num_cpus=4, resources={"sampler": 2})
        yield nodes.address


def doctor(recipe_file: Path, address: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_ddpo", "doctor", str(recipe_file), *options]
    root = Path(__file__).parents[2]
    # As in a job, whose working directory all of its workers share.
    there = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(root), **environment}
    return subprocess.run(command, cwd=root, env=there, capture_output=True, text=True, timeout=300)


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_too_few_samplers_are_a_warning_and_a_missing_resource_is_a_fault(recipe_file: Path, address: str) -> None:
    few = doctor(recipe_file, address, "--samplers.count", "3")
    none = doctor(recipe_file, address, "--samplers.resources", "{ painter = 1 }")
    assert few.returncode == 1, few.stdout + few.stderr  # three samplers and the learner leave no reward worker a place
    assert "samplers        3 of 3 have a place" in few.stdout
    assert "fault    reward_workers  0 of 1 have a place" in few.stdout and "lacks CPU (at most 0 free)" in few.stdout
    assert none.returncode == 1 and "lacks painter (at most 0 free)" in none.stdout


@pytest.mark.thorough
def test_a_large_cluster_is_sampled_on_and_a_missing_sampler_is_a_warning(recipe_file: Path, address: str) -> None:
    options = ("--samplers.count", "3", "--samplers.resources", "{ sampler = 1 }")
    done = doctor(recipe_file, address, *options, "--samplers.num_cpus", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning  samplers        2 of 3 have a place" in done.stdout
    assert "learner's micro-batches of 8" in done.stdout and "ok       ratio" in done.stdout
    assert "no actors of a run called tiny on the cluster" in done.stdout


@pytest.mark.system
def test_actors_of_a_run_of_the_same_name_are_found(
    recipe_file: Path, capsys: pytest.CaptureFixture, cluster: None
) -> None:
    class Sampler:
        pass

    actor = ray.remote(num_cpus=1)(Sampler).options(name="tiny/sampler-0").remote()
    try:
        cli.main(["doctor", str(recipe_file)])
    finally:
        ray.kill(actor)
    assert "living actors of a run called tiny: tiny/sampler-0" in capsys.readouterr().out


@pytest.mark.system
def test_a_missing_token_is_a_fault_with_the_line_that_helps(recipe_file: Path, address: str) -> None:
    done = doctor(recipe_file, address, RAY_AUTH_MODE="disabled")
    assert done.returncode == 1
    assert "fault    cluster         the cluster of RAY_ADDRESS" in done.stdout
    assert "export RAY_AUTH_MODE=token" in done.stdout and "Traceback" not in done.stdout + done.stderr
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in done.stdout + done.stderr
