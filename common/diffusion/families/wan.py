"""Wan 2.1 (Wan Team 2025, arXiv 2503.20314): a transformer over frames with a multilingual T5, and flow matching."""

import math
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.normalized_latents import NormalizedLatentsPolicy
from ray_ddpo.common.diffusion.families.published_parts import WIDE_ADAPTERS
from ray_ddpo.common.diffusion.families.video import VideoConfig, VideoPolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_21_1_3B, WAN_21_14B, WAN_22_5B
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

PIPELINES_UNIT = 16  # pixels: the pipeline takes multiples of it, whatever the decoder


def call_transformer(network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Return the transformer's velocity prediction per row."""
    return network(hidden_states=latents, timestep=timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


class WanPolicy(VideoPolicy, NormalizedLatentsPolicy):
    """A loaded WanPipeline."""

    config: "Wan"
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._solver_table(sampling)


class Wan(VideoConfig):
    """Wan 2.1, and the small Wan 2.2 of one network: text to video."""

    policy_class: ClassVar[type[DiffusersPolicy]] = WanPolicy
    pipeline_class: ClassVar[str] = "WanPipeline"
    network_class: ClassVar[str] = "WanTransformer3DModel"
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLWan",)
    latent_key: ClassVar[str] = "z_dim"
    own_size: ClassVar[tuple[int, int]] = (480, 832)
    published: ClassVar[dict[str, Configs]] = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WAN_21_1_3B,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": WAN_21_14B,
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": WAN_22_5B,
    }

    lora: LoraSettings = WIDE_ADAPTERS
    """LoRA adapters that are trained. By default rank 32 on the projections of both attentions."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Tokens of a prompt that the network reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("UMT5Config", "UMT5EncoderModel")}

    @property
    def scale_factor(self) -> int:
        return self.part_config("vae").get("scale_factor_spatial", 8)

    @property
    def frames_per_latent(self) -> int:
        return self.part_config("vae").get("scale_factor_temporal", 4)

    @property
    def size_unit(self) -> int:
        _, rows, columns = self.part_config("transformer").get("patch_size", (1, 2, 2))
        return math.lcm(PIPELINES_UNIT, self.scale_factor * rows, self.scale_factor * columns)

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, configs["text_encoder"]["d_model"])}
