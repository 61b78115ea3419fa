"""Failures of the failure table, row by row: found in time, repaired if possible, and counted."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import without_none
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import alive, at_round, beside, processes_of, rounds_done, wait_until
from tests.system.drivers import Driver, wait_until_gone

FAULTS = "tests.faulty_rewards"


def with_reward(tables: dict, tmp_path: Path, function: str, prompt: object, attempts: int = 1) -> dict:
    """The recipe with a faulty reward and a prompt that tells it what to do."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["cat", str(prompt)]))
    return {
        **tables,
        "rounds": 3,
        "sampling": {**tables["sampling"], "num_steps": 2},
        "prompts": {"name": "file", "path": str(file), "images_per_prompt": 2},
        "reward": {"name": "function", "path": f"{FAULTS}:{function}"},
        "reward_workers": {"count": 2, "timeout_seconds": 4, "attempts": attempts},
    }


def metrics_of(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def total(recipe: Recipe, name: str) -> float:
    return sum(metrics.get(name, 0) for metrics in metrics_of(recipe))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        pytest.param("raises_once", "reward_error", marks=pytest.mark.system),
        pytest.param("hangs_once", "reward_timeout", marks=pytest.mark.thorough),
    ],
)
def test_a_reward_that_fails_in_passing_is_tried_again_and_changes_no_bit(
    tables: dict, tmp_path: Path, cluster: None, function: str, reason: str
) -> None:
    marker = tmp_path / "failed"
    tables = with_reward(tables, tmp_path, function, marker, attempts=2)
    faulty = Recipe.parse({**tables, "name": "faulty"})
    fingerprint = final_fingerprint(faulty)
    assert marker.exists() and total(faulty, f"retries/{reason}") == 1 and total(faulty, "images_dropped") == 0
    assert final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True) == fingerprint


def dropped_by_group(tables: dict, tmp_path: Path, function: str, serial: bool) -> str:
    """Run with a reward that fails for some images. Check what is counted; return the weights' fingerprint."""
    recipe = Recipe.parse({**with_reward(tables, tmp_path, function, "bad"), "name": function, "rounds": 4})
    fingerprint = final_fingerprint(recipe, serial=serial)
    rounds = metrics_of(recipe)
    dropped = [metrics["images_dropped"] for metrics in rounds]
    assert sum(dropped) > 0 and all(count % 2 == 0 for count in dropped), "groups of two go whole"
    # The reward of what is left is the number of its kind, 1: an image scored 0 would pull the mean down.
    assert [metrics["reward/mean"] for metrics in rounds] == [1.0] * 4
    assert not any("bad" in name for metrics in rounds for name in metrics)
    return fingerprint


def test_images_that_cannot_be_scored_are_dropped_by_group_and_cost_no_other(tables: dict, tmp_path: Path) -> None:
    functions = ("raises_for_bad", "not_finite_for_bad")
    fingerprints = {dropped_by_group(tables, tmp_path, function, serial=True) for function in functions}
    assert len(fingerprints) == 1, "the same images dropped lead to the same bits, whatever was wrong with them"


@pytest.mark.system
def test_on_ray_images_that_cannot_be_scored_are_dropped_by_group(tables: dict, tmp_path: Path, cluster: None) -> None:
    dropped_by_group(tables, tmp_path, "raises_for_bad", serial=False)


def test_beyond_its_budget_of_images_a_run_ends_with_the_reason(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tables = with_reward(tables, tmp_path, "raises_for_bad", "bad")
    tables["reward_workers"] |= {"max_dropped": 1}
    file = written(tables, tmp_path)
    assert cli.main(["train", str(file), "--serial", "--rounds", "8"]) == 1
    said = capsys.readouterr().err
    assert "TooManyDropped" in said and "KeyError" in said and "at most 1" in said


def written(tables: dict, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(without_none(tables)))
    return file


@pytest.mark.system
def test_a_sampler_that_never_answers_ends_the_run_with_a_dump_within_the_deadline(
    tables: dict, tmp_path: Path
) -> None:
    tables |= {"rounds": 400, "runtime": {"watchdog_seconds": 6}, "name": "stuck"}
    recipe = Recipe.parse(tables)
    run = Path(recipe.run_path())
    driver = Driver(recipe, tmp_path)
    with beside(at_round(run, 2, lambda: processes_of("ray::Sampler")[0].send_signal(signal.SIGSTOP))):
        wait_until(lambda: driver.process.poll() is not None or rounds_done(run) > 0, "the first round")
        family = driver.family()
        assert driver.ended() == 1, driver.said()
    dump = (run / "watchdog.txt").read_text()
    assert "nothing was finished for runtime.watchdog_seconds = 6" in dump
    assert "runs on" in dump and "does not answer" in dump  # the sampler
    assert "--- learner" in dump and "thread MainThread" in dump  # the others' stacks
    assert "StallError" in driver.said()
    wait_until_gone(family)
    assert not (run / "lease.json").exists()


@pytest.mark.system
def test_a_stragglers_task_is_sampled_a_second_time_elsewhere(tables: dict, cluster: None) -> None:
    tables |= {"rounds": 5, "samplers": {"count": 2}, "name": "straggler"}
    recipe = Recipe.parse(tables)
    run, stopped = Path(recipe.run_path()), []

    def stop() -> None:
        stopped.append(processes_of("ray::Sampler")[0])
        stopped[0].suspend()

    with beside(at_round(run, 2, stop)):
        fingerprint = final_fingerprint(recipe)
    assert total(recipe, "retries/straggler") >= 1
    wait_until(lambda: not alive(stopped), "the end of the suspended sampler")
    assert fingerprint == final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True)
