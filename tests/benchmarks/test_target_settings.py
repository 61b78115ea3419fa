"""The comparison of settings: when a training reached its target, and the table of several seeds."""

from pathlib import Path

import pytest

from benchmarks.against_trl import words
from benchmarks.target import FAST
from benchmarks.target_settings import SETTINGS, Version, reached, table
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components

CURVE = [Version("a", 10, 1, 64, 15.0, 2.0, 0.9), Version("a", 10, 2, 128, 30.0, 6.0, 0.8)]


def test_the_target_lies_between_two_versions() -> None:
    """At 5 per cent, three quarters of the way from 2 to 6."""
    assert reached(CURVE, 5.0) == pytest.approx((1.75, 112, 26.25))
    assert reached(CURVE, 1.0) == pytest.approx((0.5, 32, 7.5))  # the pretrained model is at 0
    assert reached(CURVE, 7.0) is None


def test_the_table_has_every_seed_and_means_over_those_that_arrived() -> None:
    other = [Version("a", 11, 1, 64, 15.0, 5.0, 1.0), Version("a", 12, 1, 64, 15.0, 1.0, 1.0)]
    assert table([*CURVE, *other], 5.0).splitlines()[2] == "| a | 10: 1.8, 11: 1.0, 12: – | 88 | 21 | 0.93 |"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_recipe_that_can_be_run(name: str) -> None:
    components = build_components(Recipe.load(Path(__file__).parents[2] / FAST, words(SETTINGS[name])))
    recipe, each = components.recipe, components.algorithm.transitions_per_image(components.recipe, 8)
    components.algorithm.check_micro_batches(recipe, 8)
    assert components.algorithm.steps_per_round(recipe) >= 2 and each == 6
