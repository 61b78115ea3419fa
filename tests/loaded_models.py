"""Load the tiny models of all families and compare them with plain diffusers' pipelines of the same files."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import policy_table

SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)
PARTS = {
    "stable_diffusion": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2"),
}
ENCODING: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    "StableDiffusionXLPipeline": {},
    "StableDiffusion3Pipeline": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 12},
    "FluxPipeline": {"prompt_2": None, "max_sequence_length": 12},
}


def config_of(name: str, model: Path | str, **keys: Any) -> DiffusersConfig:
    return build(POLICIES, policy_table(name, Path(model), **keys), "policy")


def load(name: str, model: Path, **keys: Any) -> DiffusersPolicy:
    return config_of(name, model, **keys).load("cpu", SAMPLING, "sampler")


def refusal(name: str, model: Path, role: Any = "sampler", **keys: Any) -> str:
    """Return the error of loading the model."""
    with pytest.raises(ValueError) as error:
        config_of(name, model, **keys).load("cpu", SAMPLING, role)
    assert "\n" not in str(error.value) and "the hub does not answer" not in str(error.value)
    return str(error.value)


def early_refusal(name: str, model: Path, **keys: Any) -> str:
    """Return the error of `ddpo plan`, which loads nothing."""
    with pytest.raises(ValueError) as error:
        config_of(name, model, **keys).sizes(SAMPLING)
    assert str(error.value) == refusal(name, model, **keys)
    return str(error.value)


def assert_same_as_diffusers(policy: DiffusersPolicy, model: Path, **keys: Any) -> None:
    """Compare every part's weights, bit for bit, and the embeddings with those of the plain pipeline."""
    logging.set_verbosity_error()
    absent = {"safety_checker": None} if type(policy).__name__ == "StableDiffusionPolicy" else {}
    pipeline_class: Any = getattr(diffusers, policy.config.pipeline_class)
    plain = pipeline_class.from_pretrained(model, torch_dtype=policy.config.loaded_dtype, **absent, **keys)
    assert_same_parts(policy, plain)


def assert_same_parts(policy: DiffusersPolicy, plain: Any) -> None:
    config = policy.config
    for part in (config.network_name, "vae", *config.text_parts):
        ours, theirs = getattr(policy.pipeline, part).state_dict(), getattr(plain, part).state_dict()
        ours = {name.replace("base_layer.", ""): value for name, value in ours.items() if "lora_" not in name}
        assert ours.keys() == theirs.keys(), part
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), part
    encoded = [value for value in plain.encode_prompt("a cat", **ENCODING[config.pipeline_class]) if value is not None]
    if config.loaded_dtype != torch.float32:  # which rounds too much to compare embeddings
        return
    for name, ours in policy.encode(["a cat"]).items():  # of the same weights, which lie in memory in another way
        assert any(ours.shape == value.shape and torch.allclose(ours, value, 1e-4, 1e-5) for value in encoded), name
