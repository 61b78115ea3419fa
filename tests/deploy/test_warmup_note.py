"""A warmup that is longer than the run is reported by `ddpo plan` and at the start."""

from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.start import start_of
from ray_ddpo.deploy.driver.warmup_note import warmup_note


def recipe_with(tables: dict, warmup: int) -> Recipe:
    learner = {**tables["learner"], "batch_size": 4, "inner_epochs": 3, "warmup_steps": warmup}
    return Recipe.parse({**tables, "rounds": 2, "learner": learner})


def test_a_warmup_that_ends_with_the_run_is_no_matter(tables: dict) -> None:
    components = components_of(recipe_with(tables, 0))
    steps = 2 * components.recipe.images_per_round // 4 * 3
    assert warmup_note(components) is None
    assert warmup_note(components_of(recipe_with(tables, steps))) is None
    note = warmup_note(components_of(recipe_with(tables, 2 * steps)))
    assert note and f"is {2 * steps}, and the run has {steps} optimizer steps (2 rounds of {steps // 2})" in note
    assert "its last step has 50.0% of learner.learning_rate" in note


def test_plan_and_start_report_it(tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with(tables, 1000)
    assert "learner.warmup_steps is 1,000" in plan(recipe) and "warmup_steps" not in plan(recipe_with(tables, 1))
    start_of(RunFolder(str(tmp_path / "run")), components_of(recipe), resume=False)
    captured = capsys.readouterr()
    assert "note: learner.warmup_steps is 1,000" in captured.out + captured.err
