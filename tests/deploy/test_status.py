"""ddpo status of a run that is active, broke off, is done, or does not exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ddpo.cli import main
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.lease import Lease
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.status import in_words, status
from ray_ddpo.train import run_training


def test_status_of_a_run_before_its_first_round_and_while_it_is_active(tables: dict) -> None:
    recipe = Recipe.parse(tables)
    folder = RunFolder(recipe.run_path())
    folder.create()
    folder.write_recipe(recipe.model_dump())
    with Lease(folder):
        known = status(recipe.run_path())
        assert known["run_by"].startswith("process ")
        assert (known["rounds_done"], known["rounds"], known["checkpoint"], known["last_round"]) == (0, 2, None, {})
        assert "run by process" in in_words(known) and "none yet" in in_words(known)
    assert "no process runs it" in in_words(status(recipe.run_path()))


def test_status_of_a_finished_run_has_the_stats_of_its_last_round(tables: dict, capsys: pytest.CaptureFixture) -> None:
    recipe = Recipe.parse(tables)
    last = run_training(recipe, serial=True)
    capsys.readouterr()
    assert main(["status", recipe.run_path(), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["rounds_done"] == 2 and known["run_by"] is None and known["checkpoint"] == "round-000002"
    assert known["last_round"]["reward/mean"] == last["reward/mean"] and known["images_dropped"] == 0
    assert main(["status", recipe.run_path()]) == 0
    text = capsys.readouterr().out
    assert "done" in text and "2 of 2" in text and f"{last['reward/mean']:.4g}" in text and "%" in text


def test_restarts_and_dropped_images_are_summed_without_a_half_written_line(tables: dict) -> None:
    recipe = Recipe.parse(tables)
    folder = RunFolder(recipe.run_path())
    folder.create()
    folder.write_recipe(recipe.model_dump())
    rounds = [{"images_dropped": 2.0, "actor_restarts/sampler": 1.0, "actor_restarts/learner": 1.0}]
    rounds += [{"images_dropped": 1.0, "actor_restarts/sampler": 3.0, "samplers/alive": 4.0}]
    text = "".join(json.dumps(metrics) + "\n" for metrics in rounds) + '{"images_set'
    (Path(recipe.run_path()) / "metrics.jsonl").write_text(text)
    known = status(recipe.run_path())
    assert (known["images_dropped"], known["actor_restarts"], known["rounds_done"]) == (3, 5, 2)
    assert known["last_round"]["samplers/alive"] == 4


@pytest.mark.parametrize(("keys", "shown"), [({}, False), ({"warmup_steps": 9}, True)])
def test_the_learning_rate_is_shown_if_it_changes(tables: dict, keys: dict, shown: bool) -> None:
    recipe = Recipe.parse({**tables, "learner": {**tables["learner"], **keys}})
    folder = RunFolder(recipe.run_path())
    folder.create()
    folder.write_recipe(recipe.model_dump())
    (Path(recipe.run_path()) / "metrics.jsonl").write_text('{"images_dropped": 0.0, "learning_rate": 3.25e-05}\n')
    known = status(recipe.run_path())
    assert ("learning rate" in in_words(known)) is shown and (
        known["last_round"].get("learning_rate") is not None
    ) is shown
    assert ("3.25e-05" in in_words(known)) is shown


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run's folder: it has no recipe.toml" in capsys.readouterr().err


def test_status_starts_without_torch_and_ray() -> None:
    code = "import sys, ray_ddpo.deploy.commands.status; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
