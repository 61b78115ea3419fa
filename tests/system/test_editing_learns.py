"""A tiny editing run that learns: held-out edits become brighter."""

import json
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.train import run_training
from tests.input_files import input_table, save_inputs
from tests.tiny_families import policy_table, save_tiny_flux_kontext


@pytest.mark.thorough
def test_an_editing_run_learns_on_held_out_input_images(tmp_path: Path) -> None:
    trained = save_inputs(tmp_path / "trained", [f"edit {number}" for number in range(16)])
    held_out = save_inputs(tmp_path / "held_out", [f"other edit {number}" for number in range(8)])
    tables = {
        "name": "bright",
        "output_dir": str(tmp_path / "runs"),
        "rounds": 12,
        "policy": policy_table("flux_kontext", save_tiny_flux_kontext(tmp_path / "model"), train="full"),
        "prompts": input_table(trained, mask=True) | {"held_out_path": str(held_out), "images_per_prompt": 4},
        "sampling": {"num_steps": 4, "eta": 0.7, "batch_size": 16, "batches_per_round": 2},
        "reward": {"name": "brightness"},
        "algorithm": {"name": "grpo", "clip_range": 1e-2},
        "learner": {"batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-3},
        "evaluation": {"images": 64, "batch_size": 16},
    }
    recipe = Recipe.parse(tables)
    run_training(recipe, serial=True)
    output = tmp_path / "evaluation"
    assert cli.main(["evaluate", recipe.run_path(), "--output", str(output)]) == 0
    found = json.loads((output / "evaluation.json").read_text())["weights"][recipe.run_path()]["brightness"]
    assert found["change"] > 3 * found["paired_standard_error"] > 0
