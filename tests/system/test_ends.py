"""A run on Ray that loses cluster or terminal, or is interrupted, ends in one line without leftovers."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests.failure_page import assert_documented
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import rounds_done, title_of, wait_until
from tests.system.drivers import Driver, wait_until_gone
from tests.system.started_nodes import started_cluster

ENDLESS = 100_000  # rounds
SOON_SECONDS = 45.0  # in which Ray itself would not have ended; a busy machine gets a lot


def kill_named(name: str) -> Callable[[Driver], None]:
    """Return what kills the processes of a local cluster that have this name."""

    def kill(driver: Driver) -> None:
        for process in driver.family():
            if title_of(process).split(" ")[0].endswith(f"/{name}"):
                process.kill()

    return kill


def interrupt_twice(driver: Driver) -> None:
    driver.process.send_signal(signal.SIGINT)
    wait_until(
        lambda: "stopped by SIGINT" in driver.said() or driver.process.poll() is not None, "the first one's line"
    )
    driver.process.send_signal(signal.SIGINT)


def close_terminal(driver: Driver) -> None:
    """Send what a shell sends to all processes of its jobs when its terminal is closed."""
    os.killpg(driver.process.pid, signal.SIGHUP)


def ended_after(act: Callable[[Driver], None], recipe: Recipe, folder: Path, address: str | None = None) -> Driver:
    """Start a run, do something to it in its third round, and see that it ends soon and leaves no process."""
    driver = Driver(recipe, folder, address=address)
    run = Path(recipe.run_path())
    wait_until(lambda: rounds_done(run) >= 2 or driver.process.poll() is not None, "the second round")
    assert driver.process.poll() is None, driver.said()
    family = driver.family()
    began = time.monotonic()
    act(driver)
    driver.ended()
    assert time.monotonic() - began < SOON_SECONDS, driver.said()
    wait_until_gone(family)
    return driver


def resumes_to_the_same_bits(tables: dict, recipe: Recipe) -> None:
    """Resume for one more round, and compare with a run that nothing happened to."""
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    rounds = (load_checkpoint(newest).rounds_done if newest else 0) + 1
    resumed = final_fingerprint(Recipe.parse({**tables, "rounds": rounds}), resume=True, serial=True)
    assert resumed == final_fingerprint(Recipe.parse({**tables, "rounds": rounds, "name": "calm"}), serial=True)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("situation", "act", "exit_code", "commits"),
    [
        pytest.param(*("the GCS of the Ray cluster dies", kill_named("gcs_server"), 1, True), marks=pytest.mark.system),
        pytest.param(*("the driver's raylet dies", kill_named("raylet"), 1, False), marks=pytest.mark.thorough),
        pytest.param(*("a second Ctrl+C", interrupt_twice, 130, True), marks=pytest.mark.thorough),
        pytest.param(*("the terminal is closed", close_terminal, 129, True), marks=pytest.mark.system),
        pytest.param(
            *("the driver is killed", lambda driver: driver.process.kill(), -9, False), marks=pytest.mark.thorough
        ),
    ],
)
def test_a_run_ends_in_one_line_and_leaves_nothing_running(
    situation: str, act: Callable[[Driver], None], exit_code: int, commits: bool, tables: dict, tmp_path: Path
) -> None:
    tables |= {"rounds": ENDLESS, "checkpoint": {"every": ENDLESS}}
    recipe = Recipe.parse(tables)
    driver = ended_after(act, recipe, tmp_path)
    assert driver.process.returncode == exit_code, driver.said()
    if exit_code >= 0:
        assert_documented(situation, exit_code, driver.said())
    folder = RunFolder(recipe.run_path())
    if commits:
        assert newest_checkpoint(folder.checkpoints) is not None and not folder.storage.exists("lease.json")
    resumes_to_the_same_bits(tables, recipe)


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_a_run_that_has_joined_a_cluster_notices_when_its_head_is_gone(tables: dict, tmp_path: Path) -> None:
    tables |= {"rounds": ENDLESS, "checkpoint": {"every": ENDLESS}}
    recipe = Recipe.parse(tables)
    # Nodes in processes of their own: Ray would end this process too, if it were attached to the cluster.
    with started_cluster() as cluster:
        cluster.join(num_cpus=4)
        head = [each for each in cluster.head.processes() if "gcs_server" in title_of(each)]

        def lose_head(driver: Driver) -> None:
            for process in head:
                process.kill()

        driver = ended_after(lose_head, recipe, tmp_path, address=cluster.address)
    # Ray may end the driver first, because this machine's raylet ends with the head; then the reaper says so.
    assert driver.process.returncode == 1 and "cluster" in driver.said().splitlines()[-1], driver.said()
    assert "resume with --resume auto" in driver.said() and "Traceback" not in driver.said()
    resumes_to_the_same_bits(tables, recipe)
