"""The program of a model card, run by plain diffusers, gives the images that the policy gives."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.deploy.commands.model_card.card import loading
from tests.input_files import input_mask, input_pixels
from tests.own_pipelines import sizes_as_given
from tests.tiny_families import (
    BY_DDIM,
    MAKERS,
    VIDEO,
    WITHOUT_NEGATIVE,
    given_latents,
    policy_table,
    save_tiny_sd3,
    take_first_order_steps,
)
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=5)

SIZES = {"sana": (32, 32), "ltx": (32, 32), "sd3": (8, 16)}  # as the model, or not square; others: 16 × 16
PACKAGES = {"wan_i2v": " ftfy imageio", "qwen_image_edit": " torchvision", "flux2_edit": " torchvision"}
EDITED = {"image": input_pixels(0), "mask": input_mask(0).astype(np.uint8) * 255}


def image_of(program: str, family: str, folder: Path, latents: torch.Tensor, parts: dict[str, Any]) -> np.ndarray:
    """Run a card's program with these latents, and the LoRA in `folder`. A video's frames are along the first axis.

    `parts` of the pipeline are given, which cannot be loaded without torchvision. A solver of a flow takes steps of
    first order, as samplers do.
    """
    program = program.replace("generator=torch.Generator().manual_seed(0)", "latents=latents")
    program = re.sub(r"(\w+Pipeline\.from_pretrained)\(", r"functools.partial(\1, **parts)(", program)
    if family not in BY_DDIM:
        program = program.replace("pipeline.to(", "first_order(family, pipeline)\npipeline.to(")
    program, _, save = program.replace("'alice/cats'", repr(str(folder / "lora"))).rpartition("\n")
    assert "image.png" in save or "video.mp4" in save
    for name, pixels in EDITED.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
        program = program.replace(f'"{name}.png"', repr(str(folder / f"{name}.png")))
    given = {"latents": given_latents(family, latents), "first_order": take_first_order_steps}
    names: dict[str, Any] = {**given, "family": family, "functools": functools, "parts": parts}
    with sizes_as_given((16, 16)):
        exec(program, names)
    made = np.asarray(names["frames" if family in VIDEO else "image"])
    return (made if made.dtype == np.uint8 else np.rint(255 * made)).astype(int)  # Wan gives frames from 0 to 1


def compare(family: str, folder: Path, tables: dict, **keys: Any) -> None:
    """Compare the card's image with that of the policy, both with adapters, guidance and a negative prompt."""
    negative = {} if family in WITHOUT_NEGATIVE else {"negative_prompt": "a dog"}
    height, width = SIZES.get(family, (16, 16))
    size = {} if family == "sana" else {"resolution": None, "height": height, "width": width}
    table = policy_table(family, folder / "model", **size, **keys)
    recipe = Recipe.parse({**tables, "policy": table, "push": {"repo": "alice/cats"}})
    sampling = recipe.sampling.model_copy(update={"guidance_scale": 3.0, "deterministic": True, **negative})
    recipe = recipe.model_copy(update={"sampling": sampling})
    config: Any = build(POLICIES, table, "policy")
    policy = config.load("cpu", sampling, "sampler")
    scatter(policy.network, deviation=0.3)
    policy.save(folder)
    mask = EDITED["mask"][None] > 0
    inputs = InputImages(pixels=EDITED["image"][None], masks=mask) if policy.reads_inputs else None
    trajectory = sample_trajectories(policy, ["a cat"], [3], sampling, range(0), inputs=inputs)
    ours = policy.decode(trajectory.final_latents).numpy().astype(int)[0]
    program = loading(recipe, config, str(folder / "model"), "a cat")
    assert program.startswith("# pip install ") and PACKAGES.get(family, "") in program.splitlines()[0]
    noise = next(image_noise([3], policy.latent_shape))
    theirs = image_of(program, family, folder, noise, config.made_parts(folder / "model"))
    assert ours.shape == theirs.shape and ours.shape[-3:] == (height, width, 3)
    assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.01 and theirs.std() > 5


@pytest.mark.parametrize("family", POLICIES)
def test_the_program_of_a_card_gives_the_policys_image(family: str, tables: dict, tmp_path: Path) -> None:
    MAKERS[family](tmp_path / "model")
    compare(family, tmp_path, tables)


def test_a_stable_diffusion_3_without_t5_has_none_in_its_card(tables: dict, tmp_path: Path) -> None:
    save_tiny_sd3(tmp_path / "model")
    compare("sd3", tmp_path, tables, t5=False)


def test_the_program_of_both_experts_loads_a_file_into_each(tables: dict, tmp_path: Path) -> None:
    MAKERS["wan22"](tmp_path / "model")
    compare("wan22", tmp_path, tables, expert="both", guidance_scale_2=2.0)
