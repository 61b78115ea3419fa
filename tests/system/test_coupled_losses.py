"""Losses on noised samples that compare images, on Ray: the bits of one process, also after the kill of a sampler."""

import os
import signal
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import at_round, beside, processes_of

ALGORITHMS = [
    pytest.param({"name": "dpo", "beta": 20.0, "noised_samples": 2}, marks=pytest.mark.system, id="dpo"),
    pytest.param({"name": "dgpo", "beta": 20.0, "noised_samples": 2}, marks=pytest.mark.thorough, id="dgpo"),
    pytest.param({"name": "awm", "noised_samples": 2}, marks=pytest.mark.thorough, id="awm"),
    pytest.param({"name": "sft", "noised_samples": 2}, marks=pytest.mark.thorough, id="sft"),
]


def recipe_of(tables: dict, name: str, algorithm: dict, **changes: object) -> Recipe:
    """Return four rounds at lag 1, in groups of four that micro-batches part."""
    learner = {**tables["learner"], "batch_size": 4, "micro_batch_size": 1}
    prompts = {**tables["prompts"], "images_per_prompt": 4}
    small = {**tables, "algorithm": algorithm, "learner": learner, "prompts": prompts, **changes}
    return Recipe.parse({**small, "name": name, "rounds": 4, "max_policy_lag": 1})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_on_ray_with_a_kill_has_the_bits_of_one_process(algorithm: dict, tables: dict, cluster: None) -> None:
    on_ray = recipe_of(tables, "ray", algorithm, samplers={"count": 2})
    with beside(at_round(Path(on_ray.run_path()), 2, _kill_a_sampler)):
        killed = final_fingerprint(on_ray)
    assert killed == final_fingerprint(recipe_of(tables, "alone", algorithm), serial=True)


def _kill_a_sampler() -> None:
    os.kill(processes_of("ray::Sampler")[0].pid, signal.SIGKILL)
