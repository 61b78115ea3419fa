"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a transformer with classifier-free guidance and flow matching."""

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import (
    BOTH_STREAMS,
    CLIP_BIG_G,
    CLIP_L,
    FLOW_AUTOENCODER,
    T5_XXL,
)
from ray_ddpo.common.diffusion.loading.config_keys import text_tokens
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

PATCH, POSITIONS = 2, 96  # diffusers' defaults for the transformer

# As in the configuration files of stabilityai/stable-diffusion-3.5-medium and stable-diffusion-3-medium-diffusers.
MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
TEXT_AND_DECODER: Configs = {
    "vae": FLOW_AUTOENCODER | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
    "text_encoder_3": T5_XXL,
}
SD35_MEDIUM: Configs = {
    "transformer": MEDIUM
    | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    **TEXT_AND_DECODER,
}


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
) -> Tensor:
    """Return the transformer's velocity prediction per row."""
    return network(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]


class SD3Policy(DiffusersPolicy):
    """A loaded StableDiffusion3Pipeline."""

    config: "SD3"

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, self.network.config.patch_size, evenly_spaced=False)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        keys |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.config.max_sequence_length}
        return super()._encode(prompt, with_negative, **keys)


class SD3(DiffusersConfig):
    """Stable Diffusion 3 and 3.5."""

    takes_sde: ClassVar[bool] = True
    policy_class: ClassVar[type[DiffusersPolicy]] = SD3Policy
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "SD3Transformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    switches: ClassVar[dict[str, str]] = dict.fromkeys(("text_encoder_3", "tokenizer_3"), "policy.t5 = false")
    published: ClassVar[dict[str, Configs]] = {
        "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
        "stabilityai/stable-diffusion-3-medium-diffusers": {"transformer": MEDIUM, **TEXT_AND_DECODER},
    }

    lora: LoraSettings = BOTH_STREAMS
    """LoRA adapters that are trained. By default rank 32 on the attention of both streams."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """Tokens of a prompt that T5 reads."""
    t5: bool = True
    """Load the third text encoder, a T5 of 9.5 GB in half precision. If false, zeros take the place of its output."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        clip = ("CLIPTextConfig", "CLIPTextModelWithProjection")
        third = {"text_encoder_3": ("T5Config", "T5EncoderModel")} if self.t5 else {}
        return {"text_encoder": clip, "text_encoder_2": clip, **third}

    @property
    def loading(self) -> dict[str, Any]:
        return {} if self.t5 else {"text_encoder_3": None, "tokenizer_3": None}

    @property
    def size_unit(self) -> int:
        return self.scale_factor * self.part_config("transformer").get("patch_size", PATCH)

    def check_size(self) -> None:
        super().check_size()
        largest = self.size_unit * self.part_config("transformer").get("pos_embed_max_size", POSITIONS)
        for key, sides in self.given_sizes.items():
            pixels = max(side for side in sides if side is not None)
            if pixels > largest:
                raise ValueError(
                    f"policy.{key} is {pixels}: this model has positions for {largest} pixels a side at most"
                )

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        first, second, network = configs["text_encoder"], configs["text_encoder_2"], configs["transformer"]
        tokens = text_tokens(self, first) + self.max_sequence_length
        return {
            "prompt_embeds": (tokens, network["joint_attention_dim"]),
            "pooled_prompt_embeds": (first["projection_dim"] + second["projection_dim"],),
        }
