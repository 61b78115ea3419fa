"""The full loop with every model family: same bits on Ray and in one process, resumed, loaded by diffusers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build, component_class
from ray_ddpo.train import run_training
from tests.input_files import input_table, save_inputs
from tests.own_pipelines import own_pipeline
from tests.system.conftest import final_fingerprint
from tests.tiny_families import MAKERS, load_lora, policy_table

IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=3))
EACH_TIME = ("sd3", "flux_kontext")
ON_RAY = [pytest.param(name, marks=pytest.mark.system if name in EACH_TIME else IN_TURNS) for name in POLICIES]


def thorough_but(*names: str) -> list[Any]:
    """All families, of which only these belong to every run of the tests."""
    return [pytest.param(name, marks=() if name in names else IN_TURNS) for name in POLICIES]


def recipe_of(tables: dict, folder: Path, family: str, **changes: Any) -> Recipe:
    model = folder / family
    if not model.exists():
        MAKERS[family](model)
    sampling = {**tables["sampling"], "eta": 0.7}
    learner = {**tables["learner"], "micro_batch_size": 4}  # a flow has one step with noise less
    small = {**tables, "policy": policy_table(family, model), "sampling": sampling, "learner": learner}
    config: Any = component_class(POLICIES, family, "policy")
    if config.reads_inputs:
        small |= {"prompts": input_table(save_inputs(folder / "inputs"), mask=True)}
        small |= {"reward": {"name": "edit_preservation"}}
    return Recipe.parse({**small, **changes})


@pytest.mark.parametrize("family", ON_RAY)
def test_a_run_on_ray_learns_and_arrives_at_the_bits_of_one_process(
    family: str, tables: dict, tmp_path: Path, cluster: None
) -> None:
    alone = recipe_of(tables, tmp_path, family, name="alone", max_policy_lag=1)
    on_ray = recipe_of(tables, tmp_path, family, name="ray", max_policy_lag=1, samplers={"count": 2})
    assert final_fingerprint(alone, serial=True) == final_fingerprint(on_ray)
    rounds = [json.loads(line) for line in (Path(on_ray.run_path()) / "metrics.jsonl").read_text().splitlines()]
    # Sampler and learner batch differently, which moves float32's last bits.
    assert rounds[0]["ratio/max_abs_log"] <= 1e-5 and rounds[1]["kl_nats"] != 0


@pytest.mark.parametrize("family", thorough_but("sd3", "flux"))
def test_a_stopped_run_resumes_to_the_same_bits_and_its_lora_loads_in_diffusers(
    family: str, tables: dict, tmp_path: Path
) -> None:
    whole = final_fingerprint(recipe_of(tables, tmp_path, family, name="whole"), serial=True)
    checkpoint = {"every": 1, "keep": 2}
    run_training(recipe_of(tables, tmp_path, family, name="parts", rounds=1, checkpoint=checkpoint), serial=True)
    recipe = recipe_of(tables, tmp_path, family, name="parts", checkpoint=checkpoint)
    assert final_fingerprint(recipe, serial=True, resume=True) == whole
    metrics = json.loads((Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["ratio/max_abs_log"] <= 1e-5
    lora = Path(recipe.run_path()) / "lora"
    learned = load_file(lora / "pytorch_lora_weights.safetensors")
    assert any(np.abs(value).max() > 0 for name, value in learned.items() if "lora_B" in name)
    config = build(POLICIES, policy_table(family, tmp_path / family), "policy")
    pipeline = own_pipeline(family, config, tmp_path / family)
    load_lora(pipeline, lora)
    network = getattr(pipeline, config.network_name)
    assert sum("lora_B" in name for name, _ in network.named_parameters()) == sum("lora_B" in name for name in learned)


@pytest.mark.thorough
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("family", ["wan22", "wan22_i2v"])
def test_both_experts_learn_and_a_run_resumed_on_ray_arrives_at_the_bits_of_one_process(
    family: str, tables: dict, tmp_path: Path, cluster: None
) -> None:
    def recipe(name: str, **changes: Any) -> Recipe:
        policy = policy_table(family, tmp_path / family, expert="both")
        return recipe_of(tables, tmp_path, family, name=name, policy=policy, **changes)

    tables = {**tables, "sampling": {**tables["sampling"], "num_steps": 7}}  # the last two are of low noise

    whole = final_fingerprint(recipe("whole"), serial=True)
    checkpoint = {"every": 1, "keep": 2}
    run_training(recipe("parts", rounds=1, checkpoint=checkpoint), serial=True)
    resumed = recipe("parts", checkpoint=checkpoint, samplers={"count": 2})
    assert final_fingerprint(resumed, resume=True) == whole
    learned = load_file(Path(resumed.run_path()) / "lora" / "pytorch_lora_weights.safetensors")
    for part in ("transformer", "transformer_2"):
        adapters = [value for name, value in learned.items() if name.startswith(f"{part}.") and "lora_B" in name]
        assert adapters and all(np.abs(value).max() > 0 for value in adapters)


@pytest.mark.parametrize("family", thorough_but("sd3"))
def test_full_fine_tuning_learns_and_resumes_to_the_same_bits(family: str, tables: dict, tmp_path: Path) -> None:
    tables = {**tables, "learner": {**tables["learner"], "learning_rate": 1e-4}, "checkpoint": {"every": 1, "keep": 2}}

    def recipe(name: str, rounds: int) -> Recipe:
        policy = policy_table(family, tmp_path / family, train="full")
        return recipe_of(tables, tmp_path, family, name=name, rounds=rounds, policy=policy)

    whole = final_fingerprint(recipe("whole", 2), serial=True)
    run_training(recipe("parts", 1), serial=True)
    assert final_fingerprint(recipe("parts", 2), serial=True, resume=True) == whole
