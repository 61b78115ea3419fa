"""Sizes without weights: the published counts of Stable Diffusion 1.5, and those of a model that is loaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.diffusion.lora import LoraSettings, trained_parameters
from common.diffusion.policy_stable_diffusion import StableDiffusion
from common.diffusion.sizes import count_parameters, saved_activation_bytes
from common.recipe_tables import SamplingTable
from tests.tiny_policy import SAMPLING, tiny_policy


def test_stable_diffusion_1_5_has_its_published_sizes_without_a_hub_or_weights() -> None:
    config = StableDiffusion(model="stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="float16")
    sizes = config.sizes(SamplingTable(num_steps=50))
    assert sizes.network_parameters == 859_520_964
    assert sizes.trained_parameters == 797_184
    assert sizes.latent_shape == (4, 64, 64)
    assert sizes.sampler_parameters == 123_060_480 + 83_653_863  # CLIP ViT-L/14's text model, AutoencoderKL
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
    assert sizes.sampler_parameters == count_parameters(policy.vae) + count_parameters(policy.text_encoder)
    assert sizes.latent_shape == policy.latent_shape
    embeds = policy.encode(["a cat"])["prompt_embeds"]
    assert sizes.conditioning_bytes == embeds.numel() * embeds.element_size()


def test_guidance_doubles_the_activations_and_half_precision_needs_fewer_bytes(tiny_model: Path) -> None:
    def activations(dtype: str, guidance_scale: float) -> int:
        sampling = SamplingTable(num_steps=4, guidance_scale=guidance_scale)
        return StableDiffusion(model=str(tiny_model), dtype=dtype).sizes(sampling).activation_bytes

    single = activations("float32", 1.0)
    assert activations("float32", 3.0) == pytest.approx(2 * single, rel=0.02)
    assert single / 2 <= activations("bfloat16", 1.0) < 0.8 * single


def test_activations_of_a_small_network_by_hand() -> None:
    class Network(nn.Sequential):
        def forward(self, inputs: torch.Tensor, return_dict: bool) -> torch.Tensor:
            return super().forward(inputs)

    with torch.device("meta"):
        network, batch = Network(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)), torch.empty(3, 10)
    # kept: the input [3 10] of the first layer, and ReLU's output [3 20], which is the second layer's input too
    assert saved_activation_bytes(network, (batch,)) == 4 * (3 * 10 + 3 * 20)
