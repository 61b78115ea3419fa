"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324): a transformer that reads a language model's states, with flow matching."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.masked_text import MaskedTextPolicy, masked_rows
from ray_ddpo.common.diffusion.families.packing import PATCH, packed, unpacked
from ray_ddpo.common.diffusion.families.published_parts import BOTH_STREAMS, QWEN_25_VL_7B
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 128  # not in the configuration: images of 1024² pixels
UNCONDITIONAL = " "  # the text that the authors guide away from where there is no negative prompt

# As in the configuration files of Qwen/Qwen-Image.
QWEN_IMAGE: Configs = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
    "text_encoder": QWEN_25_VL_7B,
}


def call_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor,
    input_latents: Tensor | None = None,
) -> Tensor:
    """Return the transformer's velocity prediction per row. The mask is above 0 at the tokens of the prompt.

    Tokens of an input image stand behind those of the latents, and what the network says of them is ignored.
    """
    height, width = latents.shape[-2:]
    images = [latents] if input_latents is None else [latents, input_latents]
    hidden_states = torch.cat([packed(image) for image in images], dim=1)
    tokens = network(
        hidden_states=hidden_states,
        timestep=timesteps.to(latents.dtype) / 1000,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask > 0,
        img_shapes=[[(1, height // PATCH, width // PATCH)] * len(images)] * len(latents),
        return_dict=False,
    )[0]
    return unpacked(tokens[:, : hidden_states.shape[1] // len(images)], height, width)


def with_norm_of_conditional(
    unconditional: Float[Tensor, "B C H W"], conditional: Float[Tensor, "B C H W"], guidance_scale: float
) -> Float[Tensor, "B C H W"]:
    """Return the guided prediction, each of whose tokens has the norm of the conditional prediction's token."""
    guided = packed(unconditional + guidance_scale * (conditional - unconditional))
    norm = packed(conditional).norm(dim=-1, keepdim=True)
    return unpacked(guided * (norm / guided.norm(dim=-1, keepdim=True)), *conditional.shape[-2:])


class QwenImagePolicy(MaskedTextPolicy):
    """A loaded QwenImagePipeline. Latents are stored unpacked and without the axis of frames."""

    config: "QwenImageFamily"
    default_negative: ClassVar[str | None] = UNCONDITIONAL

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, PATCH, evenly_spaced=True)

    def _padded(self, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, _ = self.pipeline.encode_prompt(text, device=self.device, max_sequence_length=length)
        return masked_rows(embeds, length)

    def text_readers(self) -> list[TextReader]:
        return [TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length)]

    def _combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        return with_norm_of_conditional(unconditional, conditional, guidance_scale)

    def _statistics(self, like: Tensor) -> Iterator[Tensor]:
        """Yield mean and standard deviation of the latents' channels."""
        for values in (self.vae.config.latents_mean, self.vae.config.latents_std):
            yield torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents / (1.0 / deviation) + mean  # rounded as the pipeline does

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) * (1.0 / deviation)


class QwenImageFamily(DiffusersConfig):
    """Keys and sizes that text-to-image and editing models share."""

    takes_sde: ClassVar[bool] = True
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "QwenImageTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLQwenImage",)
    latent_key: ClassVar[str] = "z_dim"
    latent_packing: ClassVar[int] = PATCH**2

    lora: LoraSettings = BOTH_STREAMS
    """LoRA adapters that are trained. By default rank 32 on the attention of both streams."""
    max_sequence_length: int = Field(default=512, ge=1, le=1024)
    """Tokens of a prompt that the network reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration")}

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        arguments = super().pipeline_arguments(sampling, size)
        # Without a negative prompt the pipeline does not guide, and its guidance_scale is another input.
        guided = {"true_cfg_scale": arguments.pop("guidance_scale"), "negative_prompt": UNCONDITIONAL}
        return guided | arguments

    @property
    def scale_factor(self) -> int:
        return 2 ** len(self.part_config("vae").get("temperal_downsample", (False, True, True)))

    @property
    def size_unit(self) -> int:
        return self.scale_factor * PATCH

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"] // PATCH**2, *self.latent_sides(OWN_LATENT_SIZE)

    def encoded(self, vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        return super().encoded(vae, pixels.unsqueeze(2), noise.unsqueeze(2)).squeeze(2)

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)  # an image is a video of one frame

    def stochastic_steps(self, sampling: SamplingTable) -> int:
        return sampling.num_steps - 1


class QwenImage(QwenImageFamily):
    """Qwen-Image."""

    policy_class: ClassVar[type[DiffusersPolicy]] = QwenImagePolicy
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    published: ClassVar[dict[str, Configs]] = {"Qwen/Qwen-Image": QWEN_IMAGE}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        width = configs["transformer"]["joint_attention_dim"]
        return {"prompt_embeds": (self.max_sequence_length, width), "prompt_embeds_mask": (self.max_sequence_length,)}
