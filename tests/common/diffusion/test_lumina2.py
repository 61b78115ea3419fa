"""Lumina 2's forward pass over prompts of one length, and its latents, compared with diffusers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.diffusion.families.lumina2 import Lumina2, call_transformer
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.forward_passes import Passed, assert_alike, assert_same_bits, passed
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_text_to_image import save_tiny_lumina2

GENERATOR = torch.Generator().manual_seed(0)
LATENTS, TIMESTEPS = torch.randn(3, 4, 6, 4, generator=GENERATOR), torch.tensor([1000.0, 400.0, 30.0])
TEXTS = {"prompt_embeds": torch.randn(3, 9, 32, generator=GENERATOR)}
TEXTS |= {"prompt_attention_mask": (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()}
PROMPTS, SEEDS = ["a cat", "a cow"], [3, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lumina2(tmp_path_factory.mktemp("model"))


def network_of(model: Path) -> Any:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel.from_pretrained(model / "transformer")


def ours(model: Path, checkpointing: bool = False) -> Passed:
    """Return the prediction of all rows, and the gradients of the network's weights."""
    network = network_of(model)
    Lumina2(model=str(model)).set_up_network(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return passed(network, call_transformer(network, LATENTS, TIMESTEPS, **TEXTS))


def test_prompts_of_one_length_give_the_outputs_and_gradients_of_diffusers(model: Path) -> None:
    network = network_of(model)
    expected = -network(LATENTS, 1 - TIMESTEPS / 1000, *TEXTS.values(), return_dict=False)[0]
    assert_alike(ours(model), passed(network, expected))


def test_checkpointing_gives_the_same_bits(model: Path) -> None:
    assert_same_bits(ours(model, checkpointing=True), ours(model))


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("num_steps", "scale", "size", "dynamic"),
    [(3, 4.0, (32, 32), False), (7, 1.0, (48, 32), False), (4, 2.0, (32, 48), True)],
    ids=str,
)
def test_latents_equal_those_of_diffusers_own_pipeline(
    num_steps: int, scale: float, size: tuple[int, int], dynamic: bool, tmp_path: Path
) -> None:
    model = save_tiny_lumina2(tmp_path, use_dynamic_shifting=dynamic)
    height, width = size
    settings = SamplingTable(num_steps=num_steps, guidance_scale=scale, negative_prompt="dog")
    config = Lumina2(model=str(model), height=height, width=width, max_sequence_length=15)
    policy = config.load("cpu", settings, "sampler")
    found = sample_trajectories(policy, PROMPTS, SEEDS, settings, range(0)).final_latents
    keys: Any = {"guidance_scale": scale, "negative_prompt": ["dog"] * 2, "max_sequence_length": 15}
    keys |= {"height": height, "width": width, "num_inference_steps": num_steps, "output_type": "latent"}
    pipeline, noise = own_pipeline("lumina2", config, model), next(image_noise(SEEDS, policy.latent_shape))
    expected = torch.stack(list(own_call("lumina2", pipeline, PROMPTS, noise, **keys)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_sequence_length": 40}, "policy.max_sequence_length is 40: this model has places for 39 tokens"),
        ({"max_sequence_length": 15, "width": 272}, "policy.width is 272: this model has places for 256 pixels"),
    ],
    ids=str,
)
def test_texts_and_images_beyond_the_networks_places_are_refused(keys: dict, said: str, model: Path) -> None:
    with pytest.raises(ValueError, match=said):
        Lumina2(model=str(model), **keys).check()
