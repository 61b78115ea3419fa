"""HunyuanImage compared with diffusers' network and pipeline: text tokens, guiders, latents, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.diffusion.families.hunyuan_image import HunyuanImage, call_transformer
from ray_ddpo.common.diffusion.prompt_lengths import cut_prompts_in_words
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted, assert_refused
from tests.changed_keys import Change, changed_model
from tests.forward_passes import Passed, assert_alike, assert_same_bits, passed
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import policy_table
from tests.tiny_hunyuan_image import save_tiny_hunyuan_image

GENERATOR = torch.Generator().manual_seed(0)
LATENTS, TIMESTEPS = torch.randn(3, 4, 6, 4, generator=GENERATOR), torch.tensor([1000.0, 400.0, 30.0])
TEXTS = {"prompt_embeds": torch.randn(3, 9, 32, generator=GENERATOR)}
TEXTS |= {"glyph_embeds": torch.randn(3, 5, 16, generator=GENERATOR)}
TEXTS |= {"prompt_embeds_mask": (torch.arange(9) < torch.tensor([[9], [4], [1]])).float()}
TEXTS |= {"glyph_embeds_mask": (torch.arange(5) < torch.tensor([[0], [5], [2]])).float()}
PROMPTS, SEEDS = ["a cat", 'a "cat"'], [3, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hunyuan_image(tmp_path_factory.mktemp("model"))


def network_of(model: Path) -> Any:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel.from_pretrained(model / "transformer")


def config_of(model: Path, **keys: Any) -> HunyuanImage:
    table = policy_table("hunyuan_image", model, **keys)
    del table["name"]
    return HunyuanImage(**table)


def ours(model: Path, checkpointing: bool = False) -> Passed:
    """Return the prediction of all rows, and the gradients of the network's weights."""
    network = network_of(model)
    config_of(model).set_up_network(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return passed(network, call_transformer(network, LATENTS, TIMESTEPS, **TEXTS))


def test_text_tokens_in_one_order_give_the_outputs_and_gradients_of_diffusers(model: Path) -> None:
    network = network_of(model)
    expected = network(
        hidden_states=LATENTS,
        timestep=TIMESTEPS,
        encoder_hidden_states=TEXTS["prompt_embeds"],
        encoder_attention_mask=TEXTS["prompt_embeds_mask"],
        encoder_hidden_states_2=TEXTS["glyph_embeds"],
        encoder_attention_mask_2=TEXTS["glyph_embeds_mask"],
        return_dict=False,
    )[0]
    rounding = ("refiner_blocks.0.attn.to_k.bias",)  # adds one number to all scores
    assert_alike(ours(model), passed(network, expected), but=rounding)


def test_checkpointing_gives_the_same_bits(model: Path) -> None:
    assert_same_bits(ours(model, checkpointing=True), ours(model))


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("num_steps", "scale", "size"), [(3, 3.0, (16, 16)), (7, 1.0, (24, 12)), (8, 2.0, (12, 20))], ids=str
)
def test_latents_equal_those_of_diffusers_own_pipeline(
    model: Path, num_steps: int, scale: float, size: tuple[int, int]
) -> None:
    height, width = size
    settings = SamplingTable(num_steps=num_steps, guidance_scale=scale, negative_prompt="dog")
    config = config_of(model, resolution=None, height=height, width=width)
    policy = config.load("cpu", settings, "sampler")
    found = sample_trajectories(policy, PROMPTS, SEEDS, settings, range(0)).final_latents
    keys: Any = {"guidance_scale": scale, "negative_prompt": ["dog"] * 2, "max_sequence_length": 12}
    keys |= {"height": height, "width": width, "num_inference_steps": num_steps, "output_type": "latent"}
    pipeline, noise = own_pipeline("hunyuan_image", config, model), next(image_noise(SEEDS, policy.latent_shape))
    expected = torch.stack(own_call("hunyuan_image", pipeline, PROMPTS, noise, **keys))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_texts_in_quotation_marks_change_what_the_network_reads(model: Path) -> None:
    policy = config_of(model).load("cpu", SamplingTable(guidance_scale=1.0), "sampler")
    rows = policy.encode([*PROMPTS, 'a "cow"'])
    assert rows["glyph_embeds_mask"].sum(1).tolist() == [0, len('Text "cat". ') + 1, len('Text "cow". ') + 1]
    assert not rows["glyph_embeds"][0].any() and not torch.equal(rows["glyph_embeds"][1], rows["glyph_embeds"][2])


def test_a_text_in_quotation_marks_that_the_byt5_cuts_is_named(model: Path) -> None:
    config = config_of(model, max_sequence_length=300)
    readers = config.load("cpu", SamplingTable(), "sampler").text_readers()
    prompts = [f"a sign that says '{'n' * 200}'", "n" * 200, "a 'cat'"]
    said = cut_prompts_in_words(readers, prompts, SamplingTable(negative_prompt=f"'{'m' * 130}'")) or ""
    assert "1 of 3 are longer than a text encoder reads; text_encoder_2 reads 128 tokens and cuts 1" in said
    assert "text_encoder_2 reads 128 tokens and cuts sampling.negative_prompt" in said


def test_images_are_encoded_as_without_tiles(model: Path) -> None:
    whole, tiled = (
        config_of(model, vae_tiling=tiling).load("cpu", SamplingTable(), "sampler") for tiling in (False, True)
    )
    pixels = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = next(image_noise([0], whole.latent_shape))
    assert torch.equal(whole.encode_images(pixels, noise), tiled.encode_images(pixels, noise))
    assert tiled.vae.use_tiling


def test_the_distilled_model_and_other_guiders_are_refused(model: Path, tmp_path: Path) -> None:
    for number, (situation, change) in enumerate(
        (
            ("a HunyuanImage with `use_meanflow` or `guidance_embeds`", Change("transformer", "use_meanflow", True)),
            (
                "a guider of HunyuanImage other than the published ones",
                Change("model_index", "guider", ["diffusers", "PerturbedAttentionGuidance"]),
            ),
            (
                "a `spatial_compression_ratio` that a decoder's layers do not have",
                Change("vae", "spatial_compression_ratio", 4),
            ),
        )
    ):
        with pytest.raises(ValueError) as error:
            config_of(changed_model(model, [change], tmp_path / str(number))).check()
        assert_refused(situation, str(error.value))
    config_of(model).check()
    assert_accepted("the guiders of HunyuanImage, in whose place plain guidance is")
