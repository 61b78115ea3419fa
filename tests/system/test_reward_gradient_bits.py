"""Rewards with gradients on Ray: killed workers, resume and two samplers give the weights of one calm process."""

from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from tests.system.conftest import final_fingerprint
from tests.system.disturbances import beside, kill_a_worker_each_round

pytestmark = pytest.mark.system


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("name", ["alignprop", "draft_lv", "refl"])
def test_a_disturbed_run_ends_with_the_weights_of_a_calm_one(name: str, tables: dict) -> None:
    backprop = {"alignprop": [1, 4], "draft_lv": 1, "refl": [1, 3]}[name]
    tables = {
        **tables,
        "rounds": 4,
        "sampling": {**tables["sampling"], "batches_per_round": 4, "backprop_steps": backprop},
        "reward": {"name": "colourfulness"},
        "algorithm": {"name": name, **({"margin": 1e3} if name == "refl" else {})},
        "learner": {**tables["learner"], "micro_batch_size": 4},
    }
    calm = final_fingerprint(Recipe.parse({**tables, "name": "calm"}), serial=True)
    recipe = Recipe.parse({**tables, "name": "disturbed", "samplers": {"count": 2}, "reward_workers": {"count": 2}})
    kills: list = []
    with beside(kill_a_worker_each_round(Path(recipe.run_path()), kills)):
        assert final_fingerprint(recipe) == calm
    assert kills
