"""The size check trains, evaluates and reports, here with a tiny model, and finds what a run lacks."""

from pathlib import Path

import pytest

from benchmarks.size_check import NAME, main, problems, recipe_tables
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components


def test_the_recipe_of_the_size_check_is_valid(tiny_model: Path, tmp_path: Path) -> None:
    components = build_components(Recipe.parse(recipe_tables(tiny_model, tmp_path)))
    assert components.recipe.images_per_round == 2 and components.recipe.evaluation.is_due(2, components.recipe.rounds)


@pytest.mark.thorough
def test_a_tiny_size_check_is_complete_and_names_a_missing_report(tmp_path: Path) -> None:
    assert main(["--tiny", "--output", str(tmp_path / "check"), "--serial"]) == 0
    run = tmp_path / "check" / NAME
    (run / "report" / "report.html").unlink()
    assert problems(run) == ["report/report.html is missing"]
