"""Every family compared with diffusers' own pipeline: images, adapters and full networks."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.flux import Flux, token_places
from ray_ddpo.common.diffusion.families.packing import packed, unpacked
from ray_ddpo.common.diffusion.families.sd3 import SD3
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.lora.adapters import read_lora_settings, reference_policy, trained_parameters
from ray_ddpo.common.diffusion.lora.files import lora_file
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import (
    BY_DDIM,
    MAKERS,
    SAFETY_CHECKED,
    call_keys,
    load_lora,
    policy_table,
    save_tiny_flux,
    save_tiny_sd3,
    save_tiny_sdxl,
    shown,
)
from tests.tiny_flux2 import save_tiny_flux2_klein
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=5)

SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)
PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


@pytest.fixture(scope="module", params=POLICIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("model"))


def config_of(family: tuple[str, Path], **keys: Any) -> DiffusersConfig:
    name, model = family
    return build(POLICIES, policy_table(name, model, **keys), "policy")


def loaded(config: DiffusersConfig, role: Any = "sampler") -> DiffusersPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.load("cpu", SAMPLING, role)


def images(policy: DiffusersPolicy) -> np.ndarray:
    """Sample without noise, as pipelines do."""
    return (
        policy.decode(sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, range(0)).final_latents).numpy().astype(int)
    )


def pipeline_of(family: tuple[str, Path]) -> Any:
    return own_pipeline(family[0], config_of(family), family[1])


def pipelines_images(family: tuple[str, Path], pipeline: Any, shape: tuple[int, ...]) -> np.ndarray:
    keys = call_keys(family[0], 3.0) | ({"eta": 0.0} if family[0] in BY_DDIM else {})
    noise = next(image_noise(SEEDS, shape))
    return shown(own_call(family[0], pipeline, PROMPTS, noise, num_inference_steps=4, **keys))


def assert_alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare images. Latents differ by a few 1e-6, which may push a value over a rounding edge, but never further."""
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005
    assert theirs.std() > 5


def test_images_equal_those_of_diffusers_own_pipeline(family: tuple[str, Path]) -> None:
    policy = loaded(config_of(family))
    assert_alike(images(policy), pipelines_images(family, pipeline_of(family), policy.latent_shape))


def test_a_lora_loads_in_plain_diffusers_and_gives_the_same_images(family: tuple[str, Path], tmp_path: Path) -> None:
    policy = loaded(config_of(family))
    before = images(policy)
    scatter(policy.network, deviation=0.3)
    after = images(policy)
    assert np.abs(after - before).max() > 3
    policy.save(tmp_path)
    settings = read_lora_settings(lora_file(tmp_path))
    assert settings is not None and settings.rank == policy.config.lora.rank
    assert set(settings.target_modules) == set(policy.config.lora.target_modules)
    pipeline = pipeline_of(family)
    load_lora(pipeline, tmp_path / "lora")
    assert_alike(after, pipelines_images(family, pipeline, policy.latent_shape))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("z_image", ["to_q", "to_out.0", "w1"]),
        pytest.param("flux2_klein", ["to_q", "to_qkv_mlp_proj"], marks=pytest.mark.thorough),
        pytest.param("qwen_image", ["to_q", "add_k_proj"], marks=pytest.mark.thorough),
    ],
)
def test_training_starts_from_a_lora_that_diffusers_wrote(name: str, targets: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    family = name, MAKERS[name](tmp_path / "model")
    pipeline = pipeline_of(family)
    pipeline.transformer.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():  # a clear effect, whatever the processor's rounding
        for parameter in (value for key, value in pipeline.transformer.named_parameters() if "lora_B" in key):
            parameter.mul_(20)
    pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipeline.transformer))
    policy = loaded(config_of(family, lora={"path": str(tmp_path / "lora")}))
    assert_alike(images(policy), pipelines_images(family, pipeline, policy.latent_shape))
    assert np.abs(images(policy) - images(loaded(config_of(family)))).max() > 3


def test_a_full_network_loads_in_plain_diffusers_and_gives_the_same_images(
    family: tuple[str, Path], tmp_path: Path
) -> None:
    policy = loaded(config_of(family, train="full"))
    before = images(policy)
    scatter(policy.network, deviation=0.02)
    after = images(policy)
    assert np.abs(after - before).max() > 3
    written = policy.save(tmp_path)
    pipeline = pipeline_of(family)
    network = type(getattr(pipeline, policy.config.network_name)).from_pretrained(written)
    setattr(pipeline, policy.config.network_name, network)
    assert_alike(after, pipelines_images(family, pipeline, policy.latent_shape))


def test_a_learner_has_neither_text_encoders_nor_a_decoder(family: tuple[str, Path]) -> None:
    learner = loaded(config_of(family), "learner")
    assert learner.vae is None and not any(learner.text_encoders)
    assert not any(getattr(learner.pipeline, name) for name in learner.config.tokenizers)


def test_offloaded_parts_give_the_same_bits(family: tuple[str, Path]) -> None:
    there, waiting = (loaded(config_of(family, offload=offload)) for offload in (False, True))
    assert np.array_equal(images(there), images(waiting))


def test_a_tiled_decoder_gives_nearly_the_same_images(family: tuple[str, Path]) -> None:
    whole, sliced = (loaded(config_of(family, vae_slicing=slicing)) for slicing in (False, True))
    assert np.abs(images(whole) - images(sliced)).max() <= 1
    assert sliced.vae.use_slicing and not whole.vae.use_slicing
    if family[0] in SAFETY_CHECKED:  # its small model has an AutoencoderTiny
        with pytest.raises(ValueError, match="vae_tiling is true, and the model's decoder is an AutoencoderTiny"):
            loaded(config_of(family, vae_tiling=True))
    else:
        tiled = loaded(config_of(family, vae_tiling=True))
        assert tiled.vae.use_tiling and images(tiled).shape == images(whole).shape


def test_prompt_embeddings_are_cached_up_to_a_number_of_bytes(
    family: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loaded(config_of(family))
    of_one = policy.encode(["a cat"])
    if family[0].startswith("qwen_image_edit"):  # cached with their images, as test_several_inputs shows
        return
    row = sum(value[:1].nbytes for value in policy._encode("a cat", False).values())
    monkeypatch.setattr("ray_ddpo.common.diffusion.diffusers_policy.EMBEDDING_BYTES", 3 * row)
    for letter in "bcdef":
        policy.encode([f"a {letter}ow"])
    assert len(policy._embeddings) <= 3 and "" in policy._embeddings
    again = policy.encode(["a cat"])
    assert all(torch.equal(value, of_one[name]) for name, value in again.items())


def test_latents_are_packed_as_diffusers_packs_them_and_come_back() -> None:
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    theirs = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(packed(latents), theirs)
    assert torch.equal(unpacked(theirs, 6, 8), latents)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(1, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(token_places(6, 8, latents), places)


def test_distilled_guidance_is_an_input_of_the_network_which_runs_once(tmp_path: Path) -> None:
    model = save_tiny_flux(tmp_path / "model")
    seen: list[tuple[int, Tensor]] = []
    for scale in (1.0, 3.5):
        config = Flux(model=str(model), max_sequence_length=12, resolution=16)
        policy = config.load("cpu", SAMPLING.model_copy(update={"guidance_scale": scale}), "sampler")
        policy.network.register_forward_pre_hook(
            lambda _, __, named: seen.append((len(named["hidden_states"]), named["guidance"])), with_kwargs=True
        )
        sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING)
    assert {rows for rows, _ in seen} == {2}
    assert [float(guidance[0]) for _, guidance in seen] == [1.0] * 4 + [3.5] * 4


def test_a_distilled_klein_ignores_guidance_as_its_pipeline_does(tmp_path: Path) -> None:
    distilled = "flux2_klein", save_tiny_flux2_klein(tmp_path / "model", is_distilled=True)
    policy = loaded(config_of(distilled))
    assert policy.branches == 1 and set(policy.encode(["a cat"])) == {"prompt_embeds"}
    assert set(policy.config.sizes(SAMPLING, "cpu").conditioning_shape) == {"prompt_embeds"}
    assert_alike(images(policy), pipelines_images(distilled, pipeline_of(distilled), policy.latent_shape))


@pytest.mark.parametrize("num_steps", [2, 5])
def test_flux2_shifts_its_schedule_by_tokens_and_steps_as_its_pipeline_does(num_steps: int, tmp_path: Path) -> None:
    model = save_tiny_flux2_klein(tmp_path / "model")
    config, sampling = config_of(("flux2_klein", model)), SAMPLING.model_copy(update={"num_steps": num_steps})
    policy, pipeline = config.load("cpu", sampling, "learner"), pipeline_of(("flux2_klein", model))
    noise = next(image_noise(SEEDS, policy.latent_shape))
    pipeline(prompt=PROMPTS, latents=noise, num_inference_steps=num_steps, **call_keys("flux2_klein", 1.0))
    torch.testing.assert_close(policy.steps.timesteps, pipeline.scheduler.timesteps)


def test_without_t5_its_embeddings_are_zeros(tmp_path: Path) -> None:
    model = save_tiny_sd3(tmp_path / "model")
    keys = {"model": str(model), "max_sequence_length": 12}
    whole, without = (SD3(**keys, t5=t5).load("cpu", SAMPLING, "sampler") for t5 in (True, False))
    embeds, zeros = (policy.encode(["a cat"])["prompt_embeds"] for policy in (whole, without))
    assert torch.equal(embeds[:, :8], zeros[:, :8])  # of the two CLIPs
    assert embeds[:, 8:].abs().max() > 0.1 and not zeros[:, 8:].any() and zeros.shape == embeds.shape
    sizes = [SD3(**keys, t5=t5).sizes(SAMPLING, "cpu").encoding_bytes for t5 in (True, False)]
    assert sizes[0] > sizes[1]


def test_an_sdxl_in_float16_decodes_in_float32(tmp_path: Path) -> None:
    model = save_tiny_sdxl(tmp_path / "model")
    dtypes = [
        build(POLICIES, {"name": "sdxl", "model": str(model), "dtype": dtype}, "policy").decoder_dtype
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


def test_the_reference_policy_leaves_the_same_parameters_trained(family: tuple[str, Path]) -> None:
    network = loaded(config_of(family), "learner").network
    before = list(trained_parameters(network))
    with reference_policy(network):
        assert not any("lora" in name for name in trained_parameters(network))
    assert list(trained_parameters(network)) == before and before
