"""Refilled rounds on Ray: the bits of one process, with two samplers and the kill of one."""

import os
import signal
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, processes_of


def recipe_of(tables: dict, name: str, **changes: object) -> Recipe:
    tables = {
        **tables,
        "prompts": {**tables["prompts"], "images_per_prompt": 2},
        "reward": {"name": "function", "path": "tests.user_functions:seldom"},
        "algorithm": {"name": "grpo", "clip_range": 1e-3, "selection": {"refill": 20}},
    }
    return Recipe.parse({**tables, "name": name, "rounds": 4, "max_policy_lag": 1, **changes})


@pytest.mark.system
def test_a_refilled_run_on_ray_with_a_kill_has_the_bits_of_one_process(tables: dict, cluster: None) -> None:
    on_ray = recipe_of(tables, "ray", samplers={"count": 2})
    with beside(at_round(Path(on_ray.run_path()), 2, _kill_a_sampler)):
        killed = final_fingerprint(on_ray)
    assert killed == final_fingerprint(recipe_of(tables, "alone"), serial=True)


def _kill_a_sampler() -> None:
    os.kill(processes_of("ray::Sampler")[0].pid, signal.SIGKILL)
