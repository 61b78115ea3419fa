"""The sizes of a Stable Diffusion from its configuration files; SD 1.x's are known here, so that planning needs no hub."""

import json
from pathlib import Path
from typing import Any

import torch

from common.diffusion.lora import LoraSettings, make_trainable, trained_parameters
from common.diffusion.policy import quiet_libraries
from common.diffusion.sizes import PolicySizes, count_parameters, saved_activation_bytes
from common.recipe_tables import SamplingTable

# Architecture of SD 1.1 … 1.5 (Rombach et al. 2022), as in the configuration files of the published models.
SD1 = {
    "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
}
PUBLISHED = {"stable-diffusion-v1-5/stable-diffusion-v1-5": SD1, "CompVis/stable-diffusion-v1-4": SD1}


def part_config(model: str, folder: Path, part: str) -> dict[str, Any]:
    """One part's configuration. ValueError: it is neither in a folder, nor known here, nor to be had from the hub."""
    if folder.is_dir():
        return json.loads((folder / part / "config.json").read_text())
    if model in PUBLISHED:
        return PUBLISHED[model][part]
    from huggingface_hub import hf_hub_download

    try:
        return json.loads(Path(hf_hub_download(model, f"{part}/config.json")).read_text())
    except OSError as error:
        raise ValueError(f"policy.model is {model!r}: its {part}/config.json cannot be read: {error}") from error


def stable_diffusion_sizes(
    configs: dict[str, dict[str, Any]], train: str, lora: LoraSettings, dtype: torch.dtype, sampling: SamplingTable
) -> PolicySizes:
    """Build every part on the meta device and count. `configs` has one configuration a part."""
    quiet_libraries()
    parts = meta_parts(configs)
    unet, text_encoder, vae = parts["unet"], parts["text_encoder"], parts["vae"]
    text = configs["text_encoder"]
    network_parameters = count_parameters(unet)
    unet.to(dtype if train == "lora" else torch.float32)
    make_trainable(unet, train, lora)
    trained = sum(parameter.numel() for parameter in trained_parameters(unet).values())
    if train == "full":
        unet.to(dtype)  # activations are what autocast makes of them
    size, branches = configs["unet"]["sample_size"], 1 if sampling.guidance_scale == 1 else 2
    tokens, width = text["max_position_embeddings"], text["hidden_size"]
    with torch.device("meta"):
        latents = torch.empty(branches, unet.config.in_channels, size, size, dtype=dtype)
        inputs = (latents, torch.empty(branches), torch.empty(branches, tokens, width, dtype=dtype))
    activations = saved_activation_bytes(unet, inputs)
    return PolicySizes(
        (unet.config.in_channels, size, size),
        tokens * width * dtype.itemsize,
        network_parameters,
        trained,
        count_parameters(text_encoder) + count_parameters(vae),
        activations,
    )


def meta_parts(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A pipeline's networks on the meta device, by the names that diffusers gives them."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": getattr(diffusers, configs["vae"]["_class_name"]).from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
