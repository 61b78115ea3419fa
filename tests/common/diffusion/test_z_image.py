"""Z-Image's forward pass over padded prompts, compared with diffusers' own over lists of prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion.families.z_image import ZImage, call_transformer
from ray_ddpo.common.diffusion.prompt_lengths import cut_prompts_in_words
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.forward_passes import Passed, assert_alike, assert_same_bits, passed
from tests.tiny_families import save_tiny_z_image

LENGTHS = (5, 32, 40)  # filled up to 32, 32 and 64 tokens
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randn(length, 32, generator=GENERATOR) for length in LENGTHS]
LATENTS = torch.randn(3, 4, 12, 6, generator=GENERATOR)  # 18 tokens, filled up to 32
TIMESTEPS = torch.tensor([1000.0, 400.0, 30.0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_z_image(tmp_path_factory.mktemp("model"))


def network_of(model: Path) -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_pretrained(model / "transformer")


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    embeds, mask = torch.zeros(len(prompts), 64, 32), torch.zeros(len(prompts), 64)
    for row, prompt in enumerate(prompts):
        embeds[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1.0
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def ours(model: Path, checkpointing: bool = False) -> Passed:
    """Return the prediction of all rows, and the gradients of the network's weights."""
    network = network_of(model)
    ZImage(model=str(model)).set_up_network(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return passed(network, call_transformer(network, LATENTS, TIMESTEPS, **padded(PROMPTS)))


def test_padded_prompts_give_the_outputs_and_gradients_of_lists(model: Path) -> None:
    network = network_of(model)
    lists = network([*LATENTS.unsqueeze(2)], (1000 - TIMESTEPS) / 1000, PROMPTS, return_dict=False)[0]
    expected = -torch.stack(lists).squeeze(2)
    assert_alike(ours(model), passed(network, expected))


def test_checkpointing_gives_the_same_bits(model: Path) -> None:
    assert_same_bits(ours(model, checkpointing=True), ours(model))


def test_a_rows_bits_do_not_depend_on_its_neighbours_prompts(model: Path) -> None:
    network = network_of(model)
    ZImage(model=str(model)).set_up_network(network)
    with torch.no_grad():
        beside_long, beside_short = (
            call_transformer(network, LATENTS[:2], TIMESTEPS[:2], **padded([PROMPTS[0], other]))
            for other in (PROMPTS[2], PROMPTS[1])
        )
    assert torch.equal(beside_long[0], beside_short[0]) and not torch.equal(beside_long[1], beside_short[1])


def test_a_negative_prompt_has_an_effect_from_any_guidance_above_0(model: Path) -> None:
    config = ZImage(model=str(model), max_sequence_length=38, resolution=16)
    for scale, branches in ((0.0, 1), (0.5, 2)):
        sampling = SamplingTable(num_steps=4, guidance_scale=scale, negative_prompt="blurry")
        policy = config.load("cpu", sampling, "sampler")
        said = cut_prompts_in_words(policy.text_readers(), ["cat"], sampling, policy.guided_above) or ""
        assert policy.branches == branches and ("guidance_scale 0 is not above 0" in said) == (scale == 0)


def test_a_loaded_network_has_its_rotary_tables_because_their_making_cannot_be_compiled(model: Path) -> None:
    keys: dict[str, Any] = {"resolution": 16, "max_sequence_length": 38}
    network = ZImage(model=str(model), **keys).load("cpu", SamplingTable(num_steps=4), "learner").network
    assert [len(table) for table in network.rope_embedder.freqs_cis] == [128, 32, 32]
