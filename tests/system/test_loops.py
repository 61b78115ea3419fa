"""The full loop in one process and on Ray: it learns, writes its outputs, and gives the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from tests.system.conftest import final_fingerprint


def changed(tables: dict, **top_level: object) -> Recipe:
    return Recipe.parse({**tables, **top_level})


def test_two_samplers_on_ray_arrive_at_the_bits_of_one_process(tables: dict, cluster: None) -> None:
    """Of the weights, and of what the evaluations beside them have found."""
    scorers = [{"name": "brightness"}]
    evaluation = {"every": 2, "images": 6, "batch_size": 4, "scorers": scorers, "ema_decay": 0.5}
    tables = {**tables, "max_policy_lag": 1, "rounds": 3, "evaluation": evaluation}
    alone, on_ray = changed(tables, name="alone"), changed(tables, name="ray", samplers={"count": 2})
    assert final_fingerprint(alone, serial=True) == final_fingerprint(on_ray)
    found, on_ray_found = (EvalLog(Storage(recipe.run_path())).entries() for recipe in (alone, on_ray))
    assert found == on_ray_found and [each["policy_version"] for each in found] == [0, 2, 3]


def test_a_role_that_the_cluster_cannot_hold(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture, cluster: None
) -> None:
    """Beside the test above, so that one cluster serves both."""
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--samplers.num_gpus", "1"]) == 2
    refusal = "samplers: one asks for GPU 1, and the whole cluster has GPU 0: lower the role's num_gpus"
    assert refusal in capsys.readouterr().err


@pytest.mark.thorough
def test_lag_changes_what_is_learned(tables: dict) -> None:
    in_step = final_fingerprint(changed(tables, name="lag0", rounds=3), serial=True)
    lagging = final_fingerprint(changed(tables, name="lag1", rounds=3, max_policy_lag=1), serial=True)
    assert in_step != lagging


@pytest.mark.thorough
def test_another_seed_arrives_elsewhere(tables: dict) -> None:
    assert final_fingerprint(changed(tables, name="a"), serial=True) != final_fingerprint(
        changed(tables, name="b", seed=1), serial=True
    )


def test_a_run_begins_with_ratio_one_and_leaves_recipe_metrics_checkpoint_and_lora(tables: dict) -> None:
    recipe = changed(tables)
    final_fingerprint(recipe, serial=True)
    folder = Path(recipe.run_path())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [metrics["round"] for metrics in rounds] == [0, 1]
    names = {"policy_version", "images", "reward/mean", "reward/std", "reward/jpeg_compressibility/mean"}
    names |= {"advantage/std", "loss", "ratio/mean", "ratio/max_abs_log", "clip_fraction", "kl_nats", "grad_norm"}
    names |= {"lag/max", "seconds/sample", "seconds/score", "seconds/learn", "seconds/round", "idle/sampler"}
    names |= {"idle/learner", "images_per_second", "kl_nats/step_03"}
    assert names <= rounds[0].keys()
    # Sampler and learner batch differently, which moves float32's last bits: 7e-7 or 1.1e-6, by the kind of CPU.
    assert rounds[0]["ratio/max_abs_log"] <= 0.05 * 1e-4
    assert not (folder / "lease.json").exists()
    again = Recipe.load(folder / "recipe.toml")
    assert again.learner == recipe.learner and again.sampling == recipe.sampling
    lora = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert any(np.abs(value).max() > 0 for name, value in lora.items() if "lora_B" in name), "training left B at zero"
