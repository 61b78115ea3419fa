"""Stable Diffusion XL (Podell et al. 2023): two text encoders, pooled text and size ids as inputs, DDIM steps."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import AUTOENCODER, CLIP_BIG_G, CLIP_L
from ray_ddpo.common.diffusion.loading.config_keys import text_tokens
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.recipe.tables import SamplingTable

# As in the configuration files of stabilityai/stable-diffusion-xl-base-1.0.
BASE: Configs = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": AUTOENCODER | {"sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
}


def call_unet(
    scale_factor: int,
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
) -> Tensor:
    """Return the UNet's prediction per row, for images that were neither cropped nor downscaled."""
    height, width = (scale_factor * side for side in latents.shape[-2:])
    # (height, width) before cropping, (top, left) of the crop, target (height, width); created on the device.
    size_ids = torch.zeros(len(latents), 6, device=latents.device, dtype=prompt_embeds.dtype)
    size_ids[:, 0::4] = height
    size_ids[:, 1::4] = width
    added = {"text_embeds": pooled_prompt_embeds, "time_ids": size_ids}
    return network(latents, timesteps, prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]


class SDXLPolicy(DiffusersPolicy):
    """A loaded StableDiffusionXLPipeline."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        keys = self.vae.config
        mean, std = keys.get("latents_mean"), keys.get("latents_std")
        if mean is None or std is None:  # this pipeline uses both or neither, and ignores shift_factor
            return latents / keys.scaling_factor
        mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
        return latents * std / keys.scaling_factor + mean

    def _scaled(self, latents: Tensor) -> Tensor:
        keys = self.vae.config
        mean, std = keys.get("latents_mean"), keys.get("latents_std")
        if mean is None or std is None:
            return latents * keys.scaling_factor
        mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
        return (latents - mean) * keys.scaling_factor / std


class SDXL(DiffusersConfig):
    """Stable Diffusion XL."""

    policy_class: ClassVar[type[DiffusersPolicy]] = SDXLPolicy
    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    network_name: ClassVar[str] = "unet"
    network_class: ClassVar[str] = "UNet2DConditionModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    scheduler_class: ClassVar[str | None] = "DDIMScheduler"
    published: ClassVar[dict[str, Configs]] = {"stabilityai/stable-diffusion-xl-base-1.0": BASE}

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        with_projection = ("CLIPTextConfig", "CLIPTextModelWithProjection")
        return {"text_encoder": ("CLIPTextConfig", "CLIPTextModel"), "text_encoder_2": with_projection}

    @property
    def loading(self) -> dict[str, Any]:
        return {"add_watermarker": False}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return functools.partial(call_unet, self.scale_factor)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        first, second = configs["text_encoder"], configs["text_encoder_2"]
        width = first["hidden_size"] + second["hidden_size"]
        return {
            "prompt_embeds": (text_tokens(self, first), width),
            "pooled_prompt_embeds": (second["projection_dim"],),
        }

    @property
    def decoder_dtype(self) -> torch.dtype:
        if self.loaded_dtype != torch.float16:
            return self.loaded_dtype
        # The decoder's activations overflow in float16, and images come out black, unless force_upcast is false.
        keys = self.part_config("vae")
        forced = keys.get("force_upcast", keys.get("_class_name") != "AutoencoderTiny")
        return torch.float32 if forced else torch.float16
