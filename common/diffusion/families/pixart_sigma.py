"""PixArt-Sigma (Chen et al. 2024, arXiv 2403.04692): a small transformer with a T5, that steps by DDIM."""

import math
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import MASKED_EMBEDDINGS, DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import AUTOENCODER, T5_XXL, WIDE_ADAPTERS
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.recipe.tables import SamplingTable

PATCH = 2  # diffusers' default for the transformer

# As in the configuration files of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS.
SIGMA_1024: Configs = {
    "transformer": {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": 128,
        "caption_channels": 4096,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    "vae": AUTOENCODER | {"scaling_factor": 0.13025},
    "text_encoder": T5_XXL,
}


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor
) -> Tensor:
    """Return the transformer's prediction per row. Channels of a predicted variance are left out."""
    output = network(
        latents,
        encoder_hidden_states=prompt_embeds,
        encoder_attention_mask=prompt_attention_mask,
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : latents.shape[1]]


class PixArtSigmaPolicy(DiffusersPolicy):
    """A loaded PixArtSigmaPipeline."""

    config: "PixArtSigma"
    embeddings: ClassVar[tuple[str, ...]] = MASKED_EMBEDDINGS
    default_negative: ClassVar[str | None] = ""
    adds_shift: ClassVar[bool] = False

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        return super()._encode(prompt, with_negative, max_sequence_length=self.config.max_sequence_length, **keys)


class PixArtSigma(DiffusersConfig):
    """PixArt-Sigma."""

    policy_class: ClassVar[type[DiffusersPolicy]] = PixArtSigmaPolicy
    pipeline_class: ClassVar[str] = "PixArtSigmaPipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "PixArtTransformer2DModel"
    legacy_network_classes: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    scheduler_class: ClassVar[str | None] = "DDIMScheduler"
    takes_diffusers_lora: ClassVar[bool] = False
    published: ClassVar[dict[str, Configs]] = {"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": SIGMA_1024}

    lora: LoraSettings = WIDE_ADAPTERS
    """LoRA adapters that are trained. By default rank 32 on the projections of both attentions."""
    max_sequence_length: int = Field(default=300, ge=1, le=512)
    """Tokens of a prompt that T5 reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("T5Config", "T5EncoderModel")}

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        # By default sizes are rounded and, if two further packages are installed, captions are cleaned.
        return super().pipeline_arguments(sampling, size) | {"use_resolution_binning": False, "clean_caption": False}

    @property
    def size_unit(self) -> int:
        return math.lcm(super().size_unit, self.scale_factor * self.part_config("transformer").get("patch_size", PATCH))

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        return sampling.num_steps - 1  # as published, the schedule ends at timestep 0, which has no noise

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {"prompt_embeds": (tokens, configs["text_encoder"]["d_model"]), "prompt_attention_mask": (tokens,)}
