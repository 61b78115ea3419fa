"""Editing families compared with diffusers' own pipelines, on input images, masks and several sizes."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.flux2 import unsquared
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusionInpainting
from ray_ddpo.common.diffusion.rollout import image_noise, inputs_of, sample_trajectories, score
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.prompts import File, Prompt
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted
from tests.input_files import save_inputs
from tests.own_pipelines import own_call, own_pipeline
from tests.tiny_families import (
    BY_DDIM,
    EDITING,
    MAKERS,
    WITHOUT_NEGATIVE,
    call_keys,
    image_keys,
    policy_table,
    shown_latents,
)
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=5)

SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module", params=EDITING)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family's name, its small model, and diffusers' own pipeline of it."""
    name, model = request.param, MAKERS[request.param](tmp_path_factory.mktemp("model"))
    return name, model, own_pipeline(name, build(POLICIES, policy_table(name, model), "policy"), model, False)


def sampling(scale: float = 3.0, steps: int = 4, negative: str | None = None) -> SamplingTable:
    return SamplingTable(num_steps=steps, guidance_scale=scale, negative_prompt=negative)


def load(family: tuple[str, Path, Any], settings: SamplingTable, role: Any = "sampler", **keys: Any) -> DiffusersPolicy:
    table = policy_table(family[0], family[1])
    if keys:
        table.pop("resolution", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(POLICIES, table | keys, "policy").load("cpu", settings, role)


def prompts_of(folder: Path, size: tuple[int, int] = (16, 16)) -> list[Prompt]:
    return File(path=str(save_inputs(folder, size=size)), image_column="image", mask_column="mask").sampled()


def pipelines_latents(
    family: tuple[str, Path, Any], prompts: list[Prompt], settings: SamplingTable, policy: DiffusersPolicy
) -> torch.Tensor:
    """Return what the pipeline's own call makes of the prompts, from the same noise and without further noise."""
    name, _, pipeline = family
    images = [Image.open(prompt.metadata["image"]) for prompt in prompts]
    keys = call_keys(name, settings.guidance_scale, settings.negative_prompt) | image_keys(name, images[0])
    keys |= {"height": images[0].height, "width": images[0].width, "num_inference_steps": settings.num_steps}
    keys |= {"eta": 0.0} if name in BY_DDIM else {}
    if "negative_prompt" in keys:
        keys["negative_prompt"] = [(keys["negative_prompt"] or [""])[0]] * len(prompts)
    if name == "sd_inpainting":
        keys["mask_image"] = [Image.open(prompt.metadata["mask"]) for prompt in prompts]
    noise = next(image_noise(SEEDS[: len(prompts)], policy.latent_shape))
    texts = [prompt.text for prompt in prompts]
    return torch.stack(own_call(name, pipeline, texts, noise, output_type="latent", **keys | {"image": images}))


@pytest.mark.parametrize(
    ("size", "scale", "steps", "negative"),
    [((16, 16), 3.0, 4, None), ((24, 16), 0.7, 3, None), ((16, 32), 1.5, 6, "blurry")],
)
def test_latents_equal_those_of_the_pipelines_own_call(
    family: tuple[str, Path, Any], size: tuple[int, int], scale: float, steps: int, negative: str | None, tmp_path: Path
) -> None:
    settings = sampling(scale, steps, None if family[0] in WITHOUT_NEGATIVE else negative)
    policy = load(family, settings, height=size[0], width=size[1])
    prompts = prompts_of(tmp_path, size)
    texts, inputs = [prompt.text for prompt in prompts], inputs_of(policy, prompts)
    ours = sample_trajectories(policy, texts, SEEDS, settings, range(0), inputs=inputs).final_latents
    theirs = pipelines_latents(family, prompts, settings, policy)
    is_klein = family[0] == "flux2_klein_edit"  # its pipeline gives latents as the decoder takes them
    ours = unsquared(policy._unscaled(ours)) if is_klein else shown_latents(family[0], ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_learner_computes_the_samplers_exact_log_prob_of_edits(
    family: tuple[str, Path, Any], tmp_path: Path
) -> None:
    settings = sampling()
    sampler, learner = (load(family, settings, role) for role in ("sampler", "learner"))
    scatter(sampler.network)
    scatter(learner.network)
    prompts = prompts_of(tmp_path)
    texts, inputs = [prompt.text for prompt in prompts], inputs_of(sampler, prompts)
    trajectory = sample_trajectories(sampler, texts, SEEDS, settings, inputs=inputs)
    assert torch.equal(score(learner, trajectory), trajectory.log_probs)
    # One text with two images is two rows; one text with one image is one.
    assert len(trajectory.conditioning["input_latents"]) == 4
    assert inputs is not None
    twice = sample_trajectories(sampler, texts[:1] * 2, SEEDS[:2], settings, inputs=inputs.select([0, 0]))
    assert len(twice.conditioning["input_latents"]) == 1 and twice.prompt_index.tolist() == [0, 0]


def test_an_images_rows_depend_on_it_alone_and_never_change(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    policy, prompts = load(family, sampling()), prompts_of(tmp_path)
    inputs = inputs_of(policy, prompts)
    assert inputs is not None
    together = policy.encode(["a cat"] * 4, inputs)
    alone = policy.encode(["a cat"], inputs.select([2]))
    names = [name for name in together if "input_" in name]
    assert names and all(torch.equal(together[name][2:3], alone[name]) for name in names)
    assert not torch.equal(together["input_latents"][0], together["input_latents"][1])
    if "prompt_embeds" in together:
        assert torch.equal(together["prompt_embeds"][0], together["prompt_embeds"][1])
    else:  # the language model sees the image
        assert not torch.equal(together["input_prompt_embeds"][0], together["input_prompt_embeds"][1])


def test_the_input_image_and_the_mask_move_the_distribution(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    policy, prompts = load(family, sampling()), prompts_of(tmp_path)
    first, second = (inputs_of(policy, [prompt]) for prompt in prompts[:2])
    assert first is not None and second is not None
    masked = InputImages(pixels=first.pixels, masks=~first.masks)
    found = [
        sample_trajectories(policy, ["a cat"], [1], sampling(), range(0), inputs=each).final_latents
        for each in (first, second, masked)
    ]
    assert (found[0] - found[1]).abs().max() > 1e-4
    assert torch.equal(found[0], found[2]) == ("mask" not in policy.reads_inputs)
    assert_accepted("an input image, and for inpainting its mask, of each prompt")


def test_inpainting_encodes_the_mode_of_what_is_outside_the_mask(tmp_path: Path) -> None:
    model = MAKERS["sd_inpainting"](tmp_path / "model")
    torch.manual_seed(0)
    keys: Any = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
    keys |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
    vae: Any = diffusers.AutoencoderKL(**keys).eval()
    policy = StableDiffusionInpainting(model=str(model)).load("cpu", sampling(), "sampler")
    policy.vae = vae
    inputs = inputs_of(policy, prompts_of(tmp_path / "inputs"))
    assert inputs is not None
    rows = policy.encode(["a cat"] * 4, inputs)
    pixels = torch.from_numpy(inputs.pixels / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    kept = pixels * ~torch.from_numpy(inputs.masks)[:, None]
    with torch.no_grad():
        expected = vae.encode(kept).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(rows["input_latents"], expected, rtol=1e-4, atol=1e-5)
    assert rows["input_mask"].shape == (4, 1, 8, 8) and set(rows["input_mask"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("key", "value"), [("merge_size", 1), ("patch_size", 7), ("do_resize", False)])
def test_an_image_processor_that_does_not_fit_the_encoder_is_refused(key: str, value: object, tmp_path: Path) -> None:
    model = MAKERS["qwen_image_edit"](tmp_path)
    file = model / "processor" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"processor/preprocessor_config.json has {key}={value}"):
        build(POLICIES, policy_table("qwen_image_edit", model), "policy").check()
