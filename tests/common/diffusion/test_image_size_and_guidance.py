"""Height, width, guidance and negative prompts of every family: as in diffusers' own pipeline, or refused."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo import cli
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories, score
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.driver.components import build_components
from tests.accepted_page import assert_accepted, assert_refused
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import (
    BY_DDIM,
    MAKERS,
    QWEN_IMAGE,
    UNGUIDED,
    VIDEO,
    WITHOUT_NEGATIVE,
    call_keys,
    image_keys,
    policy_table,
    shown,
)
from tests.tiny_video import FRAMES

SIZES = {
    "stable_diffusion": (24, 16),
    "sd_inpainting": (24, 16),
    "sdxl": (48, 64),
    "sd3": (12, 24),
    "flux": (24, 12),
    "flux_kontext": (24, 12),
    "qwen_image": (24, 12),
    "qwen_image_edit": (24, 12),
    "qwen_image_edit_plus": (12, 24),
    "flux2": (24, 12),
    "flux2_klein": (24, 12),
    "flux2_edit": (24, 12),
    "flux2_klein_edit": (12, 24),
    "z_image": (24, 12),
    "hunyuan_image": (24, 12),
    "lumina2": (48, 32),
    "sana": (64, 32),
    "pixart_sigma": (48, 32),
    "wan": (32, 16),
    "wan22": (16, 32),
    "ltx": (64, 32),
    "wan_i2v": (32, 16),
    "wan22_i2v": (16, 32),
    "wan_ti2v": (32, 16),
}
OTHER_THAN_EMPTY = ("sdxl", *QWEN_IMAGE)  # where no negative prompt is given, the one takes zeros, the other a space
IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=2))
PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


@pytest.fixture(
    scope="module",
    params=[
        "stable_diffusion",
        *(pytest.param(name, marks=IN_TURNS) for name in POLICIES if name != "stable_diffusion"),
    ],
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family's name, its small model, and diffusers' own pipeline of it."""
    name, model = request.param, MAKERS[request.param](tmp_path_factory.mktemp("model"))
    config = build(POLICIES, policy_table(name, model), "policy")
    return name, model, own_pipeline(name, config, model)


def config_of(name: str, model: Path, height: int, width: int | None) -> DiffusersConfig:
    table = {**policy_table(name, model), "resolution": None, "height": height, "width": width}
    return build(POLICIES, table, "policy")


def sampling(guidance_scale: float, negative_prompt: str | None = None) -> SamplingTable:
    return SamplingTable(num_steps=3, guidance_scale=guidance_scale, negative_prompt=negative_prompt)


def ours(config: DiffusersConfig, settings: SamplingTable) -> np.ndarray:
    policy = config.load("cpu", settings, "sampler")
    return (
        policy.decode(sample_trajectories(policy, PROMPTS, SEEDS, settings, range(0)).final_latents).numpy().astype(int)
    )


def theirs(name: str, pipeline: Any, settings: SamplingTable, shape: tuple[int, ...]) -> np.ndarray:
    factor = scale_factor(pipeline) * (2 if name.startswith("flux2") else 1)
    noise = next(image_noise(SEEDS, shape))
    keys = call_keys(name, settings.guidance_scale, settings.negative_prompt)
    keys |= {"eta": 0.0} if name in BY_DDIM else {}
    keys |= {"height": factor * shape[-2], "width": factor * shape[-1], "num_inference_steps": 3}
    keys |= image_keys(name, Image.new("RGB", (keys["width"], keys["height"])))
    return shown(own_call(name, pipeline, PROMPTS, noise, **keys))


def scale_factor(pipeline: Any) -> int:
    """Return the pixels per side of a latent, which pipelines of video call otherwise."""
    names = (f"vae_{name}" for name in ("scale_factor", "scale_factor_spatial", "spatial_compression_ratio"))
    return next(getattr(pipeline, name) for name in names if hasattr(pipeline, name))


def assert_alike(mine: np.ndarray, expected: np.ndarray) -> None:
    """Compare images. Latents differ by a few 1e-6, which may push a value over a rounding edge, but never further."""
    difference = np.abs(mine - expected)
    assert mine.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 0.005


def test_non_square_images_equal_those_of_diffusers(family: tuple[str, Path, Any]) -> None:
    name, model, pipeline = family
    height, width = SIZES[name]
    config, settings = config_of(name, model, height, width), sampling(3.0)
    policy, learner = (config.load("cpu", settings, role) for role in ("sampler", "learner"))
    assert policy.latent_shape == learner.latent_shape == config.sizes(settings, "cpu").latent_shape
    images = ours(config, settings)
    assert images.shape == (2, *(FRAMES,) * (name in VIDEO), height, width, 3)
    assert_alike(images, theirs(name, pipeline, settings, policy.latent_shape))
    assert_accepted("`policy.height` and `policy.width`, which need not be equal, in every family")
    trajectory = sample_trajectories(policy, PROMPTS, SEEDS, settings)
    torch.testing.assert_close(score(learner, trajectory), trajectory.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "guidance_scale", [0.7, *(pytest.param(each, marks=pytest.mark.thorough) for each in (0.0, 1.5))]
)
def test_small_guidance_is_one_pass_with_the_prompt_as_in_diffusers(
    family: tuple[str, Path, Any], guidance_scale: float
) -> None:
    name, model, pipeline = family
    settings = sampling(guidance_scale)
    config = build(POLICIES, policy_table(name, model), "policy")
    assert config.branches(settings) == (2 if guidance_scale > config.guided_above and name not in UNGUIDED else 1)
    policy_shape = config.sizes(settings, "cpu").latent_shape
    assert_alike(ours(config, settings), theirs(name, pipeline, settings, policy_shape))
    assert_accepted("`guidance_scale` 0, or between 0 and 1")


def test_a_negative_prompt_leads_away_as_in_diffusers(family: tuple[str, Path, Any]) -> None:
    name, model, pipeline = family
    config = build(POLICIES, policy_table(name, model), "policy")
    shape = config.sizes(sampling(3.0), "cpu").latent_shape
    found = {}
    for negative in (None, "", "blurry"):
        settings = sampling(3.0, negative)
        if name in WITHOUT_NEGATIVE and negative:
            with pytest.raises(ValueError) as error:
                config.check_sampling(settings)
            assert_refused("a negative prompt for FLUX or FLUX.2", str(error.value))
            continue
        config.check_sampling(settings)
        found[negative] = ours(config, settings)
        assert_alike(found[negative], theirs(name, pipeline, settings, shape))
    assert_accepted("`sampling.negative_prompt` in SD, SDXL and SD3")
    if name not in WITHOUT_NEGATIVE:
        moved = np.abs(found["blurry"] - found[""])
        assert moved.max() > 1 or (moved > 0).mean() > 0.01  # more than rounding
        assert np.array_equal(found[None], found[""]) == (name not in OTHER_THAN_EMPTY)


@pytest.mark.parametrize("negative", ["blurry", None])
def test_cached_embeddings_belong_to_their_negative_prompt(tiny_model: Path, negative: str | None) -> None:
    config = build(POLICIES, policy_table("stable_diffusion", tiny_model), "policy")
    policy = config.load("cpu", sampling(3.0, negative), "sampler")
    expected = policy.encode([negative or ""])["prompt_embeds"]
    for prompts in (["a cat"], ["", "blurry"], ["a dog", "a cat"]):
        assert torch.equal(policy.encode(prompts)["negative_prompt_embeds"], expected)


@pytest.mark.rotated(every=2, group="longest")
def test_one_side_alone_and_a_sample_size_of_two_numbers(tmp_path: Path) -> None:
    model = MAKERS["stable_diffusion"](tmp_path / "model")
    assert config_of("stable_diffusion", model, 24, None).sizes(sampling(1.0), "cpu").latent_shape == (4, 12, 8)
    file = model / "unet" / "config.json"
    file.write_text(file.read_text().replace('"sample_size": 8', '"sample_size": [8, 12]'))
    config = build(POLICIES, policy_table("stable_diffusion", model), "policy")
    policy = config.load("cpu", sampling(3.0), "sampler")
    assert policy.latent_shape == config.sizes(sampling(3.0), "cpu").latent_shape == (4, 8, 12)
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = next(image_noise(SEEDS, policy.latent_shape))
    images = pipeline(prompt=PROMPTS, latents=noise, eta=0.0, num_inference_steps=3, guidance_scale=3.0).images
    assert_alike(ours(config, sampling(3.0)), np.stack([np.asarray(image) for image in images]).astype(int))
    assert_accepted("a UNet whose `sample_size` is [height, width]")


@pytest.mark.parametrize(
    ("situation", "family_name", "keys"),
    [
        ("a size that scale factor × patch does not divide", "sd3", {"height": 18}),
        ("a size beyond SD3's positions", "sd3", {"width": 40}),
        ("`policy.resolution` beside `policy.height` or `policy.width`", "sd3", {"resolution": 16, "width": 16}),
    ],
)
def test_a_size_that_cannot_be_made_is_refused_with_the_recipe(
    situation: str, family_name: str, keys: dict[str, int], tables: dict, tmp_path: Path
) -> None:
    model = MAKERS[family_name](tmp_path / "model")
    with pytest.raises(ValueError) as error:
        tables["learner"]["micro_batch_size"] = 12
        build_components(Recipe.parse({**tables, "policy": policy_table(family_name, model, **keys)}))
    assert_refused(situation, str(error.value))


def test_units_of_a_size_are_those_of_decoder_and_patch(tmp_path: Path) -> None:
    units = {"stable_diffusion": 8, "sdxl": 8, "sd3": 4, "flux": 4, "flux_kontext": 4, "qwen_image": 4}
    units |= {"qwen_image_edit": 4, "wan": 16, "wan_i2v": 16, "ltx": 32}
    units |= {"hunyuan_image": 2, "lumina2": 16, "z_image": 4, "flux2": 4, "sana": 32, "pixart_sigma": 16}
    for name, unit in units.items():
        config = build(POLICIES, policy_table(name, MAKERS[name](tmp_path / name)), "policy")
        assert config.size_unit == unit
    with pytest.raises(ValueError, match=r"policy.height is 28: .* multiples of 8 pixels, such as 24 or 32"):
        config_of("stable_diffusion", tmp_path / "stable_diffusion", 28, 16).check()


@pytest.mark.thorough
def test_a_full_run_with_non_square_images_and_a_negative_prompt(tables: dict, tmp_path: Path, capfd: Any) -> None:
    import json

    import tomli_w

    tables["policy"] |= {"height": 24, "width": 16}
    tables["sampling"] |= {"negative_prompt": "blurry", "guidance_scale": 2.0}
    tables |= {"evaluation": {"images": 4, "every": 1}, "rollouts": {"images_every": 1}, "rounds": 1}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    run = str(tmp_path / "runs" / "tiny")
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--serial"]) == 0
    assert cli.main(["report", run]) == 0
    assert cli.main(["evaluate", run, "--output", str(tmp_path / "evaluation"), "--sampling.guidance_scale", "1"]) == 0
    printed = capfd.readouterr().out
    assert "16 × 24 pixels" in printed and "sampling.guidance_scale is 1.0 here, and was 2.0" in printed
    settings = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["settings"]
    assert (settings["height"], settings["width"], settings["sampling.negative_prompt"]) == (24, 16, "blurry")
