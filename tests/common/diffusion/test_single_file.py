"""A checkpoint in one file loads as with diffusers' `from_single_file`, or is refused with a remedy."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ddpo.common.base_parts import entry_base
from ray_ddpo.common.diffusion.families.sdxl import SDXL
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.commands.model_card.card import loading
from tests.accepted_page import assert_accepted, assert_refused
from tests.single_file import save_single_file

SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)
SDXLS = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    return save_single_file(tmp_path_factory.mktemp("single"))


@pytest.fixture
def configs(saved: tuple[Path, Path, Any], tmp_path: Path) -> Path:
    """Return the folder without weights."""
    folder = tmp_path / "configs"
    shutil.copytree(saved[1], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def config_of(file: Path, configs: Path | None = None) -> StableDiffusion:
    return StableDiffusion(model=str(file), single_file_config=None if configs is None else str(configs))


def refusal(file: Path, configs: Path | None = None, early: bool = True) -> str:
    with pytest.raises(ValueError) as error:
        config_of(file, configs).load("cpu", SAMPLING, "sampler")
    if early:
        with pytest.raises(ValueError) as planned:
            config_of(file, configs).sizes(SAMPLING)
        assert str(planned.value) == str(error.value)
    return str(error.value)


def plain_parts(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    parts = {part: getattr(pipeline, part).state_dict() for part in ("unet", "vae", "text_encoder")}
    return {
        part: {name.replace("base_layer.", ""): value for name, value in state.items() if "lora_" not in name}
        for part, state in parts.items()
    }


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = plain_parts(ours), plain_parts(theirs)
    for part, state in theirs.items():
        assert ours[part].keys() == state.keys(), part
        assert all(torch.equal(ours[part][name], value) for name, value in state.items()), part


@pytest.mark.thorough
def test_one_file_is_the_folder_that_it_was_made_from(saved: tuple[Path, Path, Any], configs: Path) -> None:
    from diffusers import StableDiffusionPipeline

    file, folder, pipeline = saved
    config = config_of(file, configs)
    policy = config.load("cpu", SAMPLING, "sampler")
    plain = StableDiffusionPipeline.from_single_file(str(file), config=str(configs), local_files_only=True)
    assert_same(policy.pipeline, plain)
    assert_same(policy.pipeline, pipeline)
    ours, theirs = policy.encode(["a cat"]), pipeline.encode_prompt("a cat", "cpu", 1, True)
    torch.testing.assert_close(ours["prompt_embeds"], theirs[0], rtol=1e-4, atol=1e-5)
    learner = config.load("cpu", SAMPLING, "learner")
    assert learner.vae is None
    same = [
        name
        for name, value in learner.network.state_dict().items()
        if torch.equal(value, policy.network.state_dict()[name])
    ]
    assert len(same) >= len(pipeline.unet.state_dict())  # adapters begin at random
    sizes = config.sizes(SAMPLING)
    assert sizes.network_parameters == sum(value.numel() for value in pipeline.unet.parameters())
    assert_accepted("a checkpoint in a single file, with policy.single_file_config")


def test_parts_that_are_not_in_the_file_come_from_the_folder_and_are_fingerprinted(
    saved: tuple[Path, Path, Any], configs: Path, tmp_path: Path
) -> None:
    file, folder, pipeline = saved
    state = load_file(file)
    save_file(
        {name: value for name, value in state.items() if name.startswith("model.")}, tmp_path / "unet.safetensors"
    )
    said = refusal(tmp_path / "unet.safetensors", configs, early=False)
    assert_refused("a single file that lacks a part, and the folder of configurations too", said)
    config = config_of(tmp_path / "unet.safetensors", folder)
    assert_same(config.load("cpu", SAMPLING, "sampler").pipeline, pipeline)
    found, whole = (
        {name: part.sha256 for name, part in entry_base(each, "policy", each.files_of("sampler")).items()}
        for each in (config, config_of(file, folder))
    )
    assert set(found) == set(whole) > {"policy.model", "policy.single_file_config/vae"}
    differing = {name.rpartition("/")[2] for name in found if found[name] != whole[name]}
    assert differing == {"policy.model", "vae", "text_encoder"}


def test_a_single_file_that_cannot_be_loaded_is_refused(
    saved: tuple[Path, Path, Any], configs: Path, tmp_path: Path
) -> None:
    file, folder, _ = saved
    state = load_file(file)
    assert_refused("a single file without policy.single_file_config", refusal(file))
    assert_refused("a single file that is not there", refusal(tmp_path / "no.safetensors", configs))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert_refused("a single file that is a pickle (.ckpt)", refusal(tmp_path / "model.ckpt", configs))
    (tmp_path / "page.safetensors").write_text("<!doctype html><html>")
    assert_refused("a web page instead of a file", refusal(tmp_path / "page.safetensors", configs))
    changes = {
        "a single file of another family": state | {SDXLS: torch.zeros(1)},
        "a single file that no family trains": state | {"edm_mean": torch.zeros(1)},
        "a single file that is a LoRA": {"lora_unet_down_blocks_0.alpha": torch.zeros(1)},
    }
    for situation, changed in changes.items():
        save_file(changed, tmp_path / "changed.safetensors")
        assert_refused(situation, refusal(tmp_path / "changed.safetensors", configs))
    lacking = ("model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias", ".final_layer_norm.bias")
    for name in lacking:
        save_file(
            {each: value for each, value in state.items() if not each.endswith(name)}, tmp_path / "changed.safetensors"
        )
        said = refusal(tmp_path / "changed.safetensors", configs, early=False)
        assert_refused("weights of a part are missing in a single file", said)
    assert_refused("policy.single_file_config beside a folder", refusal(folder, configs))
    with pytest.raises(ValueError) as error:
        SDXL(model=str(file), single_file_config=str(configs)).check()
    assert_refused("policy.single_file_config of another family", str(error.value))


def test_a_model_card_reads_the_file_as_it_was_read(saved: tuple[Path, Path, Any], configs: Path, tables: dict) -> None:
    tables |= {"push": {"repo": "alice/cats"}}
    for policy, expected in (
        (config_of(saved[0], configs), f"from_single_file('{saved[0]}', config='{configs}')"),
        (StableDiffusion(model=str(saved[1]), variant="fp16"), f"from_pretrained('{saved[1]}', variant='fp16')"),
        (StableDiffusion(model=str(saved[1])), f"from_pretrained('{saved[1]}')"),
    ):
        assert f"pipeline = StableDiffusionPipeline.{expected}" in loading(Recipe.parse(tables), policy, None, "a cat")


def test_a_weight_that_is_not_finite_is_refused(saved: tuple[Path, Path, Any], configs: Path, tmp_path: Path) -> None:
    tensors = load_file(saved[0])
    name = next(
        name for name in sorted(tensors) if name.startswith("model.diffusion_model") and name.endswith("weight")
    )
    save_file({**tensors, name: torch.full_like(tensors[name], torch.inf)}, tmp_path / "inf.safetensors")
    said = refusal(tmp_path / "inf.safetensors", configs, early=False)
    assert_refused("NaN or infinity in a part's weights", said)
    assert "its unet" in said
