"""LTX-Video (HaCohen et al. 2024, arXiv 2501.00103): a transformer over strongly compressed frames, with flow matching."""

import functools
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import MASKED_EMBEDDINGS, DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.published_parts import T5_XXL, WIDE_ADAPTERS
from ray_ddpo.common.diffusion.families.video import VideoConfig, VideoPolicy
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

PIPELINES_UNIT = 32  # pixels: the pipeline takes multiples of it, whatever the decoder

# As in the configuration files of Lightricks/LTX-Video, where each class's defaults are published.
LTX_2B: Configs = {
    "transformer": {"_class_name": "LTXVideoTransformer3DModel", "in_channels": 128},
    "vae": {"_class_name": "AutoencoderKLLTXVideo", "latent_channels": 128},
    "text_encoder": T5_XXL,
}


def call_transformer(
    scale: tuple[float, float, float],
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor,
) -> Tensor:
    """Return the transformer's velocity prediction per row.

    Args:
        scale: seconds of a latent frame, and pixels of a latent's height and width, which positions are counted in.
        network: the transformer.
        latents: not packed.
        timesteps: one per row.
        prompt_embeds: one prompt's states per row.
        prompt_attention_mask: which of them are tokens.
    """
    frames, height, width = latents.shape[2:]
    tokens = network(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=prompt_embeds,
        timestep=timesteps,
        encoder_attention_mask=prompt_attention_mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=scale,
        return_dict=False,
    )[0]
    return tokens.transpose(1, 2).unflatten(2, (frames, height, width))


class LTXPolicy(VideoPolicy):
    """A loaded LTXPipeline. Latents are stored unpacked, which does not change a step."""

    config: "LTX"
    embeddings: ClassVar[tuple[str, ...]] = MASKED_EMBEDDINGS

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, 1, evenly_spaced=True)

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = (
            each.view(1, -1, 1, 1, 1).to(latents.dtype) for each in (self.vae.latents_mean, self.vae.latents_std)
        )
        return latents * deviation / self.vae.config.scaling_factor + mean


class LTX(VideoConfig):
    """LTX-Video, text to video."""

    policy_class: ClassVar[type[DiffusersPolicy]] = LTXPolicy
    pipeline_class: ClassVar[str] = "LTXPipeline"
    network_class: ClassVar[str] = "LTXVideoTransformer3DModel"
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLLTXVideo",)
    own_size: ClassVar[tuple[int, int]] = (512, 704)
    published: ClassVar[dict[str, Configs]] = {"Lightricks/LTX-Video": LTX_2B}

    lora: LoraSettings = WIDE_ADAPTERS
    """LoRA adapters that are trained. By default rank 32 on the projections of both attentions."""
    num_frames: int = Field(default=161, ge=1)
    """Frames of a video: one more than a multiple of the frames that a frame of latents has."""
    frame_rate: float = Field(default=25.0, ge=0.1, le=1000)
    """Frames a second of a video. The network reads it."""
    max_sequence_length: int = Field(default=128, ge=1, le=512)
    """Tokens of a prompt that T5 reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("T5Config", "T5EncoderModel")}

    @property
    def scale_factor(self) -> int:
        return self._halvings * self.part_config("vae").get("patch_size", 4)

    @property
    def frames_per_latent(self) -> int:
        return self._halvings * self.part_config("vae").get("patch_size_t", 1)

    @property
    def _halvings(self) -> int:
        return 2 ** sum(self.part_config("vae").get("decoder_spatio_temporal_scaling", (True, True, True, False)))

    @property
    def size_unit(self) -> int:
        return PIPELINES_UNIT

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        scale = self.frames_per_latent / self.frame_rate, float(self.scale_factor), float(self.scale_factor)
        return functools.partial(call_transformer, scale)

    def set_up_decoder(self, vae: Any) -> None:
        super().set_up_decoder(vae)
        vae.use_framewise_decoding = self.vae_tiling

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        # The pipeline's own timestep of a decoder that denoises, at which it adds no noise to the latents.
        timesteps = torch.zeros(len(latents), device=latents.device, dtype=latents.dtype)
        return vae.decode(latents, timesteps if vae.config.timestep_conditioning else None, return_dict=False)[0]

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {
            "prompt_embeds": (tokens, configs["text_encoder"]["d_model"]),
            "prompt_attention_mask": (tokens,),
        }

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        return super().pipeline_arguments(sampling, size) | {"frame_rate": self.frame_rate}
