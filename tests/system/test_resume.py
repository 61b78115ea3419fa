"""A stopped and resumed run has the bits of an uninterrupted run."""

import json
import os
import signal
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.lease import runs_it
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.driver.supervision import Stopped
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.learner.checkpoints.resume import resume_point
from ray_ddpo.train import run_training
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside


def run_in_two_parts(tables: dict, first: int, **how: bool) -> str:
    """Stop a run after `first` rounds, as at a Ctrl-C between rounds. Both starts have --resume auto."""
    checkpoint = {"every": 1, "keep": 2}
    started = Recipe.parse({**tables, "name": "parts", "rounds": first, "checkpoint": checkpoint})
    run_training(started, resume=True, **how)
    return final_fingerprint(Recipe.parse({**tables, "name": "parts", "checkpoint": checkpoint}), resume=True, **how)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_stop_and_resume_changes_no_bit_and_each_round_has_one_line(tables: dict, lag: int) -> None:
    tables |= {"rounds": 4, "max_policy_lag": lag}
    tables["sampling"]["num_steps"] = 2
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}), serial=True)
    assert run_in_two_parts(tables, 2, serial=True) == whole
    lines = (Path(tables["output_dir"]) / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.same_bits
def test_stop_and_resume_changes_no_bit_on_ray(tables: dict, cluster: None) -> None:
    tables |= {"rounds": 3}
    whole = final_fingerprint(Recipe.parse({**tables, "name": "whole"}))
    assert run_in_two_parts(tables, 1) == whole


@pytest.mark.thorough
def test_a_resume_cuts_the_ledger_back_to_the_checkpoint(tables: dict) -> None:
    recipe = Recipe.parse({**tables, "rounds": 3, "checkpoint": {"every": 1, "keep": 3}})
    run_training(recipe, serial=True)
    folder = RunFolder(recipe.run_path())
    ledger = Ledger(folder.storage, recipe.rollouts)
    before = [ledger.read(round_index).drop_columns(["seconds"]) for round_index in range(3)]
    folder.checkpoints.remove("round-000003")
    folder.storage.write("rollouts/round=000007/images.parquet", b"of rounds that are done again")
    found = resume_point(folder, build_components(recipe).resolved(), resume=True)
    assert found is not None and found.rounds_done == found.ledger_rounds == 2
    run_training(recipe, serial=True, resume=True)
    assert ledger.rounds() == [0, 1, 2]
    assert [ledger.read(round_index).drop_columns(["seconds"]) for round_index in range(3)] == before


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.thorough), 2])
def test_a_signal_in_one_process_commits_the_last_complete_round(tables: dict, lag: int) -> None:
    tables |= {"rounds": 6, "max_policy_lag": lag, "checkpoint": {"every": 100}}
    tables["sampling"]["num_steps"] = 2
    recipe = Recipe.parse({**tables, "name": "stopped"})
    folder = RunFolder(recipe.run_path())
    terminate = at_round(Path(recipe.run_path()), 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with beside(terminate), pytest.raises(Stopped):
        run_training(recipe, serial=True)
    newest = newest_checkpoint(folder.checkpoints)
    assert newest is not None and 2 <= load_checkpoint(newest).rounds_done < 6
    resumed = final_fingerprint(recipe, resume=True, serial=True)
    assert resumed == final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True)
    assert runs_it(folder) is None and Ledger(folder.storage, recipe.rollouts).rounds() == list(range(6))
