"""The sizes of a Stable Diffusion from its configuration files; SD 1.x's are known here, so that planning needs no hub."""

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.diffusion.lora import LoraSettings, base_weight_bytes, make_trainable, trained_parameters
from common.diffusion.meta_device import library_bytes
from common.diffusion.policy import quiet_libraries
from common.diffusion.sizes import DeviceKind, PolicySizes, count_parameters, parameter_bytes
from common.diffusion.stable_diffusion_memory import StableDiffusionMemory
from common.recipe_tables import SamplingTable
from common.trajectory import DTYPES

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


@dataclass(frozen=True)
class Training:
    """What of `[policy]` decides a model's memory."""

    train: str
    lora: LoraSettings
    dtype: torch.dtype
    sampler_dtype: torch.dtype
    gradient_checkpointing: bool
    merge_adapters: bool

    @property
    def loaded(self) -> torch.dtype:
        """Of weights as they are read: those of a whole network that is trained are float32."""
        return torch.float32 if self.train == "full" else self.dtype


def stable_diffusion_sizes(
    configs: dict[str, dict[str, Any]], training: Training, sampling: SamplingTable, device: DeviceKind
) -> PolicySizes:
    """Build every part on the meta device and count. `configs` has one configuration a part."""
    branches = 1 if sampling.guidance_scale == 1 else 2
    sizes = _counted(json.dumps(configs, sort_keys=True), training, branches, device)
    path = (sampling.num_steps + 1) * math.prod(sizes.latent_shape)  # numbers an image
    kept = DTYPES[sampling.latents_dtype].itemsize
    return replace(
        sizes,
        drawing=sizes.drawing.plus(0, path * (4 + 2 * kept)),  # noise, the path step by step, and as one tensor
        decoding=sizes.decoding.plus(0, path * kept),
    )


@functools.lru_cache(maxsize=16)
def _counted(configs: str, training: Training, branches: int, device: DeviceKind) -> PolicySizes:
    quiet_libraries()
    tables = json.loads(configs)
    parts = meta_parts(tables)
    for part in parts.values():
        part.to(training.loaded)
    unet, text = parts["unet"], tables["text_encoder"]
    network_parameters = count_parameters(unet)
    make_trainable(unet, training.train, training.lora)
    trained = sum(parameter.numel() for parameter in trained_parameters(unet).values())
    text_shape, size = (text["max_position_embeddings"], text["hidden_size"]), unet.config.sample_size
    memory = StableDiffusionMemory(unet, text_shape, training.dtype, device)
    # Gradient and AdamW's two moments, in float32, of each trained parameter.
    learning = parameter_bytes(unet) + 3 * 4 * trained + library_bytes(device)
    learner = memory.learning(branches, training.gradient_checkpointing).plus(learning)
    if training.train == "lora":
        memory.change_dtype(training.sampler_dtype)
    held = sum(parameter_bytes(part) for part in parts.values()) + library_bytes(device)
    if training.merge_adapters:  # the weights beside adapters are kept as they were
        held += base_weight_bytes(unet)
    return PolicySizes(
        (unet.config.in_channels, size, size),
        {"prompt_embeds": text_shape, "negative_prompt_embeds": text_shape},
        math.prod(text_shape) * training.dtype.itemsize,
        network_parameters,
        trained,
        count_parameters(parts["text_encoder"]) + count_parameters(parts["vae"]),
        learner,
        memory.drawing(branches).plus(held),
        memory.decoding(parts["vae"]).plus(held),
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
