"""Sizes without weights: the published counts of Stable Diffusion 1.5, and those of a model that is loaded."""

from pathlib import Path

import pytest

from common.diffusion.live_bytes import PeakBytes
from common.diffusion.lora import LoraSettings, trained_parameters
from common.diffusion.policy_stable_diffusion import StableDiffusion
from common.diffusion.sizes import count_parameters, largest_divisor, usable_bytes
from common.recipe_tables import SamplingTable
from tests.tiny_policy import SAMPLING, tiny_policy


def test_stable_diffusion_1_5_has_its_published_sizes_without_a_hub_or_weights() -> None:
    config = StableDiffusion(model="stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="float16")
    sizes = config.sizes(SamplingTable(num_steps=50))
    assert sizes.network_parameters == 859_520_964
    assert sizes.trained_parameters == 797_184
    assert sizes.latent_shape == (4, 64, 64)
    assert sizes.conditioning_bytes == 77 * 768 * 2


@pytest.mark.parametrize(
    "keys", [{}, {"lora": LoraSettings(rank=7, target_modules=("to_q",))}, {"train": "full"}], ids=str
)
def test_the_counts_are_those_of_the_model_once_it_is_loaded(keys: dict, tiny_model: Path) -> None:
    sizes = StableDiffusion(model=str(tiny_model), **keys).sizes(SAMPLING)
    policy = tiny_policy(tiny_model, **keys)
    trained = trained_parameters(policy.network)
    assert sizes.trained_parameters == sum(value.numel() for value in trained.values())
    adapters = sum(value.numel() for name, value in trained.items() if "lora_" in name)
    assert sizes.network_parameters == count_parameters(policy.network) - adapters
    assert sizes.latent_shape == policy.latent_shape
    embeds = policy.encode(["a cat"])["prompt_embeds"]
    assert sizes.conditioning_bytes == embeds.numel() * embeds.element_size()


@pytest.mark.thorough
def test_guidance_doubles_a_pair_and_half_precision_needs_fewer_bytes(tiny_model: Path) -> None:
    def pair(dtype: str, guidance_scale: float) -> float:
        sampling = SamplingTable(num_steps=4, guidance_scale=guidance_scale)
        return StableDiffusion(model=str(tiny_model), dtype=dtype).sizes(sampling, "cpu").learner.each

    single = pair("float32", 1.0)
    assert pair("float32", 3.0) == pytest.approx(2 * single, rel=0.05)
    assert single / 2 <= pair("bfloat16", 1.0) < 0.9 * single


def test_what_is_held_beside_the_work_is_weights_gradients_and_moments(tiny_model: Path) -> None:
    lora, full = (
        StableDiffusion.model_validate({"model": str(tiny_model), "train": train}).sizes(SAMPLING, "cpu")
        for train in ("lora", "full")
    )
    held = 4 * lora.network_parameters + (4 + 12) * lora.trained_parameters
    assert lora.learner.fixed == pytest.approx(held, rel=0.02)
    assert full.learner.fixed == pytest.approx(16 * full.network_parameters, rel=0.1)


def test_a_merged_sampler_keeps_the_weights_beside_its_adapters_twice(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    twice = sum(
        value.nbytes
        for name, value in policy.network.named_parameters()
        if name.endswith(tuple(f"{projection}.base_layer.weight" for projection in projections))
    )
    apart, merged = (
        StableDiffusion(model=str(tiny_model), merge_adapters=merge).sizes(SAMPLING, "cpu") for merge in (False, True)
    )
    assert merged.drawing.of(3) - apart.drawing.of(3) == twice > 0


def test_what_is_left_free_of_a_gpu_and_what_fits_into_it() -> None:
    assert usable_bytes(10e9, processes=2) == pytest.approx(0.9 * (10e9 - 2 * 600e6))
    peak = PeakBytes(100, 30)
    assert [peak.largest(bytes) for bytes in (90, 129, 130, 191)] == [0, 0, 1, 3]
    assert peak.of(3) == 190
    assert [largest_divisor(12, most) for most in (0, 1, 5, 11, 100)] == [0, 1, 4, 6, 12]
