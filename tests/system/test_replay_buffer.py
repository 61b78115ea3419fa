"""Earlier rounds trained on again on Ray: the bits of one process, with two samplers and the kills of two roles."""

import os
import signal
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, in_turn, processes_of


def recipe_of(tables: dict, name: str, **changes: object) -> Recipe:
    off_policy = {"ratio": "proximal", "importance_weight": 1e-2}
    tables = {
        **tables,
        "prompts": {**tables["prompts"], "images_per_prompt": 2},
        "algorithm": {"name": "grpo", "clip_range": 1e-3, "off_policy": off_policy},
        "learner": {**tables["learner"], "replay_rounds": 2},
    }
    return Recipe.parse({**tables, "name": name, "rounds": 5, "max_policy_lag": 1, **changes})


@pytest.mark.system
def test_replay_on_ray_with_kills_has_the_bits_of_one_process(tables: dict, cluster: None) -> None:
    on_ray = recipe_of(tables, "ray", samplers={"count": 2})
    folder = Path(on_ray.run_path())
    kills = in_turn(
        at_round(folder, 2, lambda: _kill("ray::Sampler")), at_round(folder, 3, lambda: _kill("ray::Learner"))
    )
    with beside(kills):
        killed = final_fingerprint(on_ray)
    assert killed == final_fingerprint(recipe_of(tables, "alone"), serial=True)


def _kill(title: str) -> None:
    os.kill(processes_of(title)[0].pid, signal.SIGKILL)
