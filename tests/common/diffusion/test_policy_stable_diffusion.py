"""Stable Diffusion as a policy: compared with the slow reference and diffusers' pipeline, and the ways of loading."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion, StableDiffusionPolicy
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS, Conditioning, PolicyConfig, select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.reference import ddpo_reference as reference
from tests.tiny_families import policy_table, save_tiny_sdxl
from tests.tiny_pipeline import save_tiny_pipeline
from tests.tiny_policy import SAMPLING, scatter, tiny_policy

ALPHAS = reference.alphas_cumprod()


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> StableDiffusionPolicy:
    return tiny_policy(tiny_model)


def some_latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows_of(policy: StableDiffusionPolicy, prompts: list[str]) -> Conditioning:
    return select_rows(policy.encode(prompts), torch.arange(len(prompts)))


@torch.no_grad()
def check_against_reference(policy: StableDiffusionPolicy, prediction_type: str) -> None:
    """Compute both guidance branches one after the other and row by row, then DDIM in float64."""
    conditioning, latents = rows_of(policy, ["a cat", "a dog", "a cow", "a hen"]), some_latents(4)
    transition = policy.transition(latents, torch.arange(4), conditioning)
    for step, timestep in enumerate(reference.leading_timesteps(4)):
        row = slice(step, step + 1)
        without = policy.network(latents[row], timestep, policy.encode([""])["prompt_embeds"]).sample.double()
        with_prompt = policy.network(latents[row], timestep, conditioning["prompt_embeds"][row]).sample.double()
        output = (without + 3.0 * (with_prompt - without)).numpy()
        alpha = float(ALPHAS[timestep])
        following = reference.next_alpha(ALPHAS, timestep, 4, set_alpha_to_one=False)
        sigma = reference.ddim_sigma(alpha, following, 1.0)
        x0_and_noise = reference.clean_and_noise(prediction_type, latents[row].double().numpy(), output, alpha)
        mean = reference.ddim_mean(*x0_and_noise, following, sigma)
        np.testing.assert_allclose(transition.mean[row].numpy(), mean, rtol=1e-4, atol=1e-4)
        assert float(transition.std[step]) == pytest.approx(sigma, rel=1e-4)


def test_a_step_is_guidance_of_two_separate_passes_and_then_the_papers_step(policy: StableDiffusionPolicy) -> None:
    check_against_reference(policy, "epsilon")


def test_a_model_that_predicts_v_takes_the_papers_steps_too(tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model", prediction_type="v_prediction")
    check_against_reference(tiny_policy(model), "v_prediction")


def test_a_vector_of_steps_is_the_same_as_one_step_after_the_other(policy: StableDiffusionPolicy) -> None:
    prompts, latents, steps = ["a cat", "a dog", "a cow"], some_latents(3), torch.tensor([3, 0, 2])
    with torch.no_grad():
        together = policy.transition(latents, steps, rows_of(policy, prompts))
        for row, prompt in enumerate(prompts):
            alone = policy.transition(latents[row : row + 1], steps[row : row + 1], rows_of(policy, [prompt]))
            torch.testing.assert_close(together.mean[row : row + 1], alone.mean, rtol=1e-5, atol=1e-5)
            assert torch.equal(together.std[row : row + 1], alone.std)


@pytest.mark.parametrize(("guidance_scale", "rows_a_pass"), [(1.0, 2), (3.0, 4)])
def test_guidance_runs_each_latent_twice_in_one_pass_and_once_without(
    guidance_scale: float, rows_a_pass: int, tiny_model: Path
) -> None:
    policy = tiny_policy(tiny_model, sampling=SamplingTable(num_steps=4, guidance_scale=guidance_scale))
    seen: list[int] = []
    policy.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        policy.transition(some_latents(2), torch.tensor([0, 1]), rows_of(policy, ["a cat", "a dog"]))
    assert seen == [rows_a_pass]


def test_a_prompts_embedding_equals_transformers_in_any_batch(policy: StableDiffusionPolicy, tiny_model: Path) -> None:
    conditioning = policy.encode(["a dog", "a cat"])
    assert torch.equal(conditioning["prompt_embeds"][1:], policy.encode(["a cat"])["prompt_embeds"])
    torch.testing.assert_close(conditioning["prompt_embeds"][1:], reference.text_embedding(tiny_model, "a cat"))
    torch.testing.assert_close(conditioning["negative_prompt_embeds"], reference.text_embedding(tiny_model, ""))
    assert not torch.allclose(conditioning["prompt_embeds"][0], conditioning["prompt_embeds"][1], atol=1e-2)


def test_images_equal_those_of_diffusers_own_pipeline(tiny_model: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    policy = StableDiffusion(model=str(tiny_model)).load("cpu", SAMPLING, "sampler")
    pixels = policy.decode(sample_trajectories(policy, ["a cat", "a dog"], [3, 4], SAMPLING).final_latents)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipeline(
        ["a cat", "a dog"], num_inference_steps=4, guidance_scale=3.0, eta=1.0, generator=generators
    ).images
    theirs = np.stack([np.asarray(image) for image in images]).astype(int)
    # Latents agree to a few 1e-6, which may push a value over a rounding edge here and there, never further.
    difference = np.abs(pixels.numpy().astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001
    assert theirs.std() > 5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_denoising_gives_the_guided_prediction_and_its_target_by_hand(kind: str, tmp_path: Path) -> None:
    policy = tiny_policy(save_tiny_pipeline(tmp_path / "model", prediction_type=kind), "sampler")
    clean, noise, timesteps = some_latents(3, 1), some_latents(3, 2), torch.tensor([900, 500, 3])
    conditioning = rows_of(policy, ["a cat", "a dog", "a cow"])
    predicted, target = policy.denoise(clean, noise, timesteps, conditioning)
    for row, timestep in enumerate(timesteps.tolist()):
        alpha = float(ALPHAS[timestep])
        noised = alpha**0.5 * clean[row : row + 1] + (1 - alpha) ** 0.5 * noise[row : row + 1]
        plain = policy.network(noised, timestep, policy.encode([""])["prompt_embeds"]).sample[0]
        prompted = policy.network(noised, timestep, conditioning["prompt_embeds"][row : row + 1]).sample[0]
        torch.testing.assert_close(predicted[row], plain + 3.0 * (prompted - plain), rtol=1e-4, atol=1e-5)
        expected = noise[row] if kind == "epsilon" else alpha**0.5 * noise[row] - (1 - alpha) ** 0.5 * clean[row]
        torch.testing.assert_close(target[row], expected, rtol=1e-5, atol=1e-6)


def test_a_learner_has_neither_text_encoder_nor_decoder_and_the_same_network(
    policy: StableDiffusionPolicy, tiny_model: Path
) -> None:
    learner = tiny_policy(tiny_model, "learner")
    assert learner.vae is None and learner.text_encoders == [None] and learner.pipeline.tokenizer is None
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, learner.network.state_dict()[name]), name


@pytest.mark.rotated(every=2, group="longest")
def test_a_resolution_means_the_same_latents_to_sampler_and_learner(tiny_model: Path) -> None:
    shapes = [tiny_policy(tiny_model, role, resolution=32).latent_shape for role in ("sampler", "learner")]
    assert shapes == [(4, 16, 16), (4, 16, 16)]  # this decoder makes 2 × 2 pixels of a latent
    assert StableDiffusion(model=str(tiny_model), resolution=32).sizes(SAMPLING).latent_shape == (4, 16, 16)


def test_a_missing_folder_is_named_with_what_could_be_given_instead() -> None:
    allowed = re.escape(f"one of {sorted(EMBEDDED_MODELS)}")
    with pytest.raises(ValueError, match=rf"policy.model is '/no/such/model'.*a hub name .* {allowed}"):
        StableDiffusion(model="/no/such/model").load("cpu", SAMPLING, "sampler")


def test_a_folder_without_weights_is_an_error_that_names_the_model(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in (model / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=f"policy.model is '{model}', which cannot be loaded"):
        StableDiffusion(model=str(model)).load("cpu", SAMPLING, "sampler")


def test_the_scheduler_that_stable_diffusion_1_5_was_published_with_becomes_ddim(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]}))
    published = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    check_against_reference(tiny_policy(model), "epsilon")


def test_full_training_trains_every_parameter_in_float32_and_survives_its_files(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = tiny_policy(tiny_model, "learner", train="full", dtype="bfloat16")
    parameters = trained_parameters(policy.network)
    assert len(parameters) == len(list(policy.network.parameters()))
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    saved = policy.save(tmp_path)
    before = {name: value.clone() for name, value in parameters.items()}
    scatter(policy.network, seed=5)
    policy.restore(saved)
    for name, value in trained_parameters(policy.network).items():
        assert torch.equal(value, before[name]), name


def test_a_bfloat16_network_gives_float32_distributions_near_those_of_float32(
    policy: StableDiffusionPolicy, tiny_model: Path
) -> None:
    half = tiny_policy(tiny_model, dtype="bfloat16")
    adapters = trained_parameters(half.network)
    assert {value.dtype for value in adapters.values()} == {torch.bfloat16}
    assert half.network.conv_in.weight.dtype == torch.bfloat16
    latents, steps = some_latents(2), torch.tensor([0, 3])
    with torch.no_grad():
        rough = half.transition(latents, steps, rows_of(half, ["a cat", "a dog"]))
        exact = policy.transition(latents, steps, rows_of(policy, ["a cat", "a dog"]))
    assert rough.mean.dtype == torch.float32 and torch.equal(rough.std, exact.std)
    difference = (rough.mean - exact.mean).abs()
    assert float(difference.max()) > 0 and float(difference.mean()) < 0.05


def test_full_networks_do_not_train_in_float16(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="full networks train in float32 or bfloat16"):
        StableDiffusion(model=str(tiny_model), train="full", dtype="float16").check()


def test_the_embedded_models_resolution_is_counted_by_its_own_autoencoder() -> None:
    assert StableDiffusion(model="tiny_animals", resolution=32).latent_sides(16) == (8, 8)
    assert StableDiffusion(model="tiny_animals").latent_sides(16) == (16, 16)


def test_only_a_samplers_network_may_have_another_dtype(tiny_model: Path) -> None:
    config = StableDiffusion(model=str(tiny_model), sampler_dtype="bfloat16")
    sampler, learner = (config.load("cpu", SAMPLING, role) for role in ("sampler", "learner"))
    assert sampler.network.conv_in.weight.dtype == torch.bfloat16
    assert sampler.vae.dtype == sampler.text_encoders[0].dtype == learner.network.conv_in.weight.dtype == torch.float32
    adapters = [trained_parameters(each.network).values() for each in (sampler, learner)]
    assert [{value.dtype for value in each} for each in adapters] == [{torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize(
    ("keys", "differ"),
    [
        ({}, False),
        ({"compile": "both", "merge_adapters": True}, False),
        ({"dtype": "bfloat16"}, False),
        ({"dtype": "bfloat16", "sampler_dtype": "bfloat16"}, False),
        ({"sampler_dtype": "float16"}, True),
        ({"dtype": "bfloat16", "sampler_dtype": "float32"}, True),
        ({"dtype": "float16", "compile": "both"}, True),
        ({"dtype": "float16", "merge_adapters": True}, True),
    ],
)
def test_numerics_differ_if_half_precision_rounds_at_other_places(keys: dict, differ: bool) -> None:
    assert StableDiffusion(model="tiny_animals", **keys).numerics_differ is differ


def test_only_adapters_are_merged() -> None:
    with pytest.raises(ValueError, match='merge_adapters is true and train "full"'):
        StableDiffusion(model="tiny_animals", train="full", merge_adapters=True)


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("ends_at_image", [True, False, None])
@pytest.mark.parametrize(
    "keys",
    [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "leading", "steps_offset": 0},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
    ],
)
@pytest.mark.parametrize("save", [save_tiny_pipeline, save_tiny_sdxl])
def test_the_steps_that_a_plan_counts_are_those_of_the_loaded_model(
    save: Any, keys: dict[str, Any], ends_at_image: bool | None, tmp_path: Path
) -> None:
    model = save(tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), **keys, "set_alpha_to_one": ends_at_image}
    if ends_at_image is None:
        del config["set_alpha_to_one"]
    file.write_text(json.dumps(config))
    name = "sdxl" if save is save_tiny_sdxl else "stable_diffusion"
    policy = build(POLICIES, policy_table(name, model), "policy", PolicyConfig)
    sampling = SamplingTable(num_steps=4)
    assert policy.stochastic_steps(sampling) == len(policy.load("cpu", sampling, "learner").stochastic_steps)
