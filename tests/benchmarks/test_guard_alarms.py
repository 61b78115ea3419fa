"""The table of the guard's alarms in healthy runs: counts and extremes by hand, and recipes that exist."""

import pytest

from benchmarks.guard_alarms import RUNS, table
from ray_ddpo.common.recipe.recipe import Recipe


def entry(version: int, edges: float, saturation: float | None, *about: str) -> dict:
    statistics = dict.fromkeys(("sharpness", "entropy", "diversity"), 1.0) | {"edge_density": edges, "dark_share": 0.1}
    alarms = [{"about": each, "says": each} for each in about]
    return {"policy_version": version, "image_statistics": statistics, "saturation": saturation, "alarms": alarms}


def test_alarms_are_counted_by_limit() -> None:
    later = [entry(2, 0.4, 0.5, "edge_density", "named"), entry(4, 0.8, 0.9), entry(6, 0.2, 0.1, "edge_density")]
    lines = table({"a": [entry(0, 0.8, 0.0), *later], "b": [entry(0, 0.8, None), entry(1, 0.6, None)]}).splitlines()
    assert lines[0] == "| limit | `a` | `b` |"
    assert "| edge_density | 2 of 3; 0.25 | 0 of 1; 0.75 |" in lines
    assert "| saturation | 0 of 3; 0.90 | no bound |" in lines and "| scorers | 1 of 3 | 0 of 1 |" in lines


@pytest.mark.parametrize("name", RUNS)
def test_the_recipes_of_the_table_evaluate(name: str) -> None:
    recipe = Recipe.load(name, **RUNS[name])
    assert recipe.rounds % recipe.evaluation.every == 0 and recipe.guard.on_alarm == "continue"
