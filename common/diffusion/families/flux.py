"""FLUX.1 and FLUX.1 Kontext (Black Forest Labs 2024, 2025): a guidance-distilled transformer over packed latents."""

import functools
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy
from ray_ddpo.common.diffusion.families.packing import PATCH, packed, unpacked
from ray_ddpo.common.diffusion.families.published_parts import BOTH_STREAMS, CLIP_L, FLOW_AUTOENCODER, T5_XXL
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 128  # not in the configuration: images of 1024² pixels

# As in the configuration files of black-forest-labs/FLUX.1-dev; FLUX.1-schnell has no embedded guidance.
DEV: Configs = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    "vae": FLOW_AUTOENCODER | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
}


def token_places(height: int, width: int, like: Tensor, image: int = 0) -> Float[Tensor, "L 3"]:
    """Return (image, row, column) of each token, created on the device. The image that is made is number 0."""
    rows = torch.arange(height // PATCH, device=like.device, dtype=like.dtype)
    columns = torch.arange(width // PATCH, device=like.device, dtype=like.dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.full_like(grid[:, :1], image), grid], dim=1)


def call_transformer(
    guidance_scale: float,
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    input_latents: Tensor | None = None,
) -> Tensor:
    """Return the transformer's velocity prediction per row. The guidance scale is an input of the network.

    Tokens of an input image stand behind those of the latents, and what the network says of them is ignored.
    """
    height, width = latents.shape[-2:]
    images = [latents] if input_latents is None else [latents, input_latents]
    guidance, hidden_states = None, torch.cat([packed(image) for image in images], dim=1)
    places = [token_places(height, width, prompt_embeds, number) for number in range(len(images))]
    if network.config.guidance_embeds:
        guidance = torch.full((len(latents),), guidance_scale, device=latents.device, dtype=torch.float32)
    tokens = network(
        hidden_states=hidden_states,
        timestep=timesteps.to(latents.dtype) / 1000,
        guidance=guidance,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=latents.device, dtype=prompt_embeds.dtype),
        img_ids=torch.cat(places),
        return_dict=False,
    )[0]
    return unpacked(tokens[:, : hidden_states.shape[1] // len(images)], height, width)


class FluxPolicy(DiffusersPolicy):
    """A loaded FluxPipeline. Latents are stored unpacked, which does not change a step."""

    config: "Flux"

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        evenly_spaced = not self.pipeline.scheduler.config.get("use_flow_sigmas", False)
        return self._flow_table(sampling, PATCH, evenly_spaced)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


class FluxKontextPolicy(EditingPolicy, FluxPolicy):
    """A loaded FluxKontextPipeline. The input image's tokens are a second image beside the latents."""

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        return {"input_latents": self._latents_of(pixels)}


class FluxFamily(DiffusersConfig):
    """Keys and sizes that text-to-image and editing models of FLUX.1 share."""

    takes_sde: ClassVar[bool] = True
    takes_negative_prompt: ClassVar[bool] = False  # the guidance scale is an input of the network
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "FluxTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    latent_packing: ClassVar[int] = PATCH**2

    lora: LoraSettings = BOTH_STREAMS  # Flow-GRPO's adapter for FLUX is larger and stands in the recipe
    """LoRA adapters that are trained. By default rank 32 on the attention of both streams."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Tokens of a prompt that T5 reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("CLIPTextConfig", "CLIPTextModel"), "text_encoder_2": ("T5Config", "T5EncoderModel")}

    def branches(self, sampling: SamplingTable) -> int:
        return 1

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"] // PATCH**2, *self.latent_sides(OWN_LATENT_SIZE)

    @property
    def size_unit(self) -> int:
        return self.scale_factor * PATCH

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return functools.partial(call_transformer, sampling.guidance_scale)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self.max_sequence_length, configs["text_encoder_2"]["d_model"]),
            "pooled_prompt_embeds": (configs["text_encoder"]["hidden_size"],),
        }

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes


class Flux(FluxFamily):
    """FLUX.1. Guidance is distilled, so that it needs no second forward pass."""

    policy_class: ClassVar[type[DiffusersPolicy]] = FluxPolicy
    pipeline_class: ClassVar[str] = "FluxPipeline"
    published: ClassVar[dict[str, Configs]] = {
        "black-forest-labs/FLUX.1-dev": DEV,
        "black-forest-labs/FLUX.1-schnell": {**DEV, "transformer": DEV["transformer"] | {"guidance_embeds": False}},
    }


class FluxKontext(FluxFamily):
    """FLUX.1 Kontext, which edits an input image as the prompt says. Input and output have one size."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = FluxKontextPolicy
    pipeline_class: ClassVar[str] = "FluxKontextPipeline"
    published: ClassVar[dict[str, Configs]] = {"black-forest-labs/FLUX.1-Kontext-dev": DEV}

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        # By default the pipeline resizes output and input image to sizes that the model was trained with.
        own = {"height": size[0], "width": size[1], "max_area": size[0] * size[1], "_auto_resize": False}
        return super().pipeline_arguments(sampling, size) | own

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return super().conditioning_shapes(configs) | {"input_latents": self.latent_shape(configs["transformer"])}
