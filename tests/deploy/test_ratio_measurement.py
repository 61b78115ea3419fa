"""The measured ratio noise is that of sampler and learner: equal bits in float32, else rounding."""

from typing import Any

import numpy as np
import torch

from ray_ddpo.common.diffusion.rollout import score
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RoleTable, RuntimeTable
from ray_ddpo.deploy.commands.doctor.ratio_measurement import runtime_of, sample_some, score_again
from ray_ddpo.deploy.commands.doctor.ratio_noise import Noise, RatioComparison, share_outside
from tests.tiny_policy import tiny_policy


def measured(tables: dict[str, Any], **sampling: Any) -> Noise:
    recipe = Recipe.parse({**tables, "sampling": {**tables["sampling"], **sampling}})
    return score_again(recipe, sample_some(recipe))


def named(noise: Noise, part: str) -> RatioComparison:
    (found,) = [comparison for comparison in noise.comparisons if part in comparison.name]
    return found


def test_the_learner_gets_the_samplers_bits_whichever_dtype_paths_are_stored_in(tables: dict[str, Any]) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        noise = measured(tables, latents_dtype=dtype)
        assert named(noise, f"as sampled, {dtype}").largest == 0
        assert noise.of_the_run.name == "learner's micro-batches of 8" and noise.of_the_run.largest < 1e-5
        assert noise.latent_elements == 4 * 8 * 8


def test_every_comparison_has_all_trained_steps_and_one_at_a_time_a_single_image(tables: dict[str, Any]) -> None:
    noise = measured(tables, timestep_fraction=0.5, skip_last_steps=1)
    for comparison in noise.comparisons:
        images = 1 if comparison.name.startswith("one transition") else 4
        assert comparison.steps.tolist() == [[0, 1, 2]] * images and comparison.log_ratios.shape == (images, 3)
    assert set(noise.sensitivity) == {0, 1, 2}


def test_rounding_after_scoring_moves_the_ratio_and_bfloat16_more_than_float16(tables: dict[str, Any]) -> None:
    noise = measured(tables)
    half, brain = named(noise, "rounded to float16"), named(noise, "rounded to bfloat16")
    assert 0 < half.largest < brain.largest
    assert share_outside(brain.log_ratios, 1e-3) > share_outside(half.log_ratios, 1e-3)


def test_half_precision_is_compared_with_its_rounding_of_a_float32_trajectory(tables: dict[str, Any]) -> None:
    recipe = Recipe.parse({**tables, "sampling": {**tables["sampling"], "latents_dtype": "bfloat16"}})
    sampled = sample_some(recipe)
    assert (sampled.as_stored.latents.dtype, sampled.in_float32.latents.dtype) == (torch.bfloat16, torch.float32)
    noise = score_again(recipe, sampled)
    assert [one.name for one in noise.comparisons if one.kind == "rounded"] == ["rounded to bfloat16 once scored"]


def test_the_comparison_with_the_sampler_sees_other_weights(tables: dict[str, Any]) -> None:
    sampled = sample_some(Recipe.parse(tables))
    moved = tiny_policy(tables["policy"]["model"], "learner")  # its adapters are not those that sampled
    assert np.abs((score(moved, sampled.as_stored) - sampled.as_stored.log_probs).numpy()).max() > 1e-4


def test_kernels_that_a_cpu_has_are_compared_and_the_others_named(tables: dict[str, Any]) -> None:
    noise = measured(tables)
    kernels = {"math attention", "flash attention", "memory-efficient attention", "cuDNN attention"}
    compared = {comparison.name for comparison in noise.comparisons} & kernels
    assert compared | set(noise.unavailable) == kernels and "math attention" in compared


def test_a_role_without_a_gpu_computes_on_the_cpu_as_its_actor_would() -> None:
    runtime = RuntimeTable()
    assert runtime_of(RoleTable(), runtime).device == "cpu"
    assert runtime_of(RoleTable(num_gpus=0.5), runtime).device == "auto"
