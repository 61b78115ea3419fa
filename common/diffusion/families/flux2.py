"""FLUX.2 (Black Forest Labs 2025): dev with distilled guidance, and klein with true guidance or distilled to few steps."""

import functools
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.flux2_published import DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE_4B, KLEIN_BASE_9B
from ray_ddpo.common.diffusion.families.masked_text import with_negative_rows
from ray_ddpo.common.diffusion.families.packing import PATCH
from ray_ddpo.common.diffusion.families.published_parts import BOTH_STREAMS
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader, tokens_before
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.diffusion.several_inputs import ReadsSeveralInputs, SeveralInputsPolicy, input_shapes
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 64  # not in the configuration: images of 1024² pixels
# The streams' attention, and the one layer of a single block that gives queries, keys, values and MLP.
FLUX2_LORA = BOTH_STREAMS.model_copy(update={"target_modules": (*BOTH_STREAMS.target_modules, "attn.to_qkv_mlp_proj")})


def token_places(height: int, width: int, text: int, device: torch.device, images: int = 1) -> tuple[Tensor, Tensor]:
    """Return (time, row, column, place in the text) of image tokens and of text tokens, created on the device.

    The image that is made has time 0, and input images behind it 10, 20, …
    """
    rows, columns, words = (torch.arange(count, device=device) for count in (height, width, text))
    zero, times = torch.zeros(1, device=device, dtype=torch.long), 10 * torch.arange(images, device=device)
    return torch.cartesian_prod(times, rows, columns, zero), torch.cartesian_prod(zero, zero, zero, words)


def call_transformer(
    guidance_scale: float | None,
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    input_latents: Tensor | None = None,
    input_fillers: Tensor | None = None,
) -> Tensor:
    """Return the velocity prediction per row. A `guidance_scale` is an input of the network.

    Tokens of input images stand behind those of the latents, and what the network says of them is ignored. None of the
    images is a filler.
    """
    height, width = latents.shape[-2:]
    images = [latents] if input_latents is None else [latents, *input_latents.unbind(1)]
    image, text = token_places(height, width, prompt_embeds.shape[1], latents.device, len(images))
    guidance = None
    if guidance_scale is not None:
        guidance = torch.full((len(latents),), guidance_scale, device=latents.device, dtype=torch.float32)
    tokens = network(
        hidden_states=torch.cat([each.flatten(2).transpose(1, 2) for each in images], dim=1),
        timestep=timesteps.to(latents.dtype) / 1000,
        guidance=guidance,
        encoder_hidden_states=prompt_embeds,
        img_ids=image,
        txt_ids=text,
        return_dict=False,
    )[0]
    return tokens[:, : height * width].transpose(1, 2).reshape(latents.shape)


def empirical_shift(tokens: int, num_steps: int) -> float:
    """Return μ of the schedule's shift, which the authors fitted to the numbers of image tokens and of steps."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, num_steps)


def squares(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C4 H2 W2"]:
    """Put each square of 2 × 2 latents into the channels of one, as the network takes them."""
    parts = latents.unflatten(-1, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unsquared(latents: Float[Tensor, "B C4 H W"]) -> Float[Tensor, "B C H2 W2"]:
    """Undo `squares`."""
    parts = latents.unflatten(1, (-1, PATCH, PATCH))
    return parts.permute(0, 1, 4, 2, 5, 3).flatten(-2).flatten(2, 3)


class Flux2Policy(DiffusersPolicy):
    """A loaded Flux2Pipeline or Flux2KleinPipeline. Latents are squares of the decoder's."""

    config: "Flux2Config"

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        evenly_spaced = not self.pipeline.scheduler.config.get("use_flow_sigmas", False)
        shift = empirical_shift(self.latent_shape[1] * self.latent_shape[2], sampling.num_steps)
        return self._flow_table(sampling, 1, evenly_spaced, shift)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        rows = self._states(prompt)
        return with_negative_rows(rows, self._states("")) if with_negative and self.branches == 2 else rows

    def _states(self, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        return {"prompt_embeds": self.pipeline.encode_prompt(text, self.device, max_sequence_length=length)[0]}

    def text_readers(self) -> list[TextReader]:
        own = self.pipeline.tokenizer
        tokenizer = getattr(own, "tokenizer", own)  # of a processor
        before = tokens_before(tokenizer, functools.partial(self.config.in_template, own))
        return [TextReader("text_encoder", tokenizer, self.config.max_sequence_length - before)]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents' channels, as the decoder's batch norm has them."""
        norm = self.vae.bn
        deviation = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        mean, deviation = (
            each.view(1, -1, 1, 1).to(like.device, like.dtype) for each in (norm.running_mean, deviation)
        )
        return mean, deviation

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation


class Flux2Config(DiffusersConfig):
    """What dev and klein share."""

    takes_sde: ClassVar[bool] = True
    policy_class: ClassVar[type[DiffusersPolicy]] = Flux2Policy
    takes_negative_prompt: ClassVar[bool] = False  # its pipelines take none
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "Flux2Transformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLFlux2",)
    latent_packing: ClassVar[int] = PATCH**2

    lora: LoraSettings = FLUX2_LORA
    """LoRA adapters that are trained. By default rank 32 on the attention of all blocks."""
    max_sequence_length: int = Field(default=512, ge=1, le=2048)
    """Tokens of a prompt and its template that the text encoder reads. The network reads as many, with filling."""

    @abstractmethod
    def in_template(self, tokenizer: Any, prompt: str) -> str:
        """Return a prompt in the text encoder's chat template."""

    @property
    def scale_factor(self) -> int:
        return PATCH * super().scale_factor

    @property
    def size_unit(self) -> int:
        return self.scale_factor

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"], *self.latent_sides(OWN_LATENT_SIZE)

    def encoded(self, vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        return squares(super().encoded(vae, pixels, unsquared(noise)))

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decoded(vae, unsquared(latents))

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, configs["transformer"]["joint_attention_dim"])}


class Flux2Dev(Flux2Config):
    """FLUX.2-dev, with or without an input image. Guidance is distilled, so that it needs no second forward pass."""

    pipeline_class: ClassVar[str] = "Flux2Pipeline"
    pipeline_packages: ClassVar[tuple[str, ...]] = ("torchvision",)  # for its processor
    published: ClassVar[dict[str, Configs]] = {"black-forest-labs/FLUX.2-dev": DEV}

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Mistral3Config", "Mistral3ForConditionalGeneration")}

    def in_template(self, tokenizer: Any, prompt: str) -> str:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        return tokenizer.apply_chat_template(format_input([prompt])[0], tokenize=False)

    def branches(self, sampling: SamplingTable) -> int:
        return 1

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return functools.partial(call_transformer, sampling.guidance_scale)


class Klein(Flux2Config):
    """FLUX.2-klein, with or without an input image, distilled to few steps without guidance, or its base with guidance."""

    pipeline_class: ClassVar[str] = "Flux2KleinPipeline"
    published: ClassVar[dict[str, Configs]] = {
        "black-forest-labs/FLUX.2-klein-4B": KLEIN_4B,
        "black-forest-labs/FLUX.2-klein-9B": KLEIN_9B,
        "black-forest-labs/FLUX.2-klein-base-4B": KLEIN_BASE_4B,
        "black-forest-labs/FLUX.2-klein-base-9B": KLEIN_BASE_9B,
    }

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Qwen3Config", "Qwen3ForCausalLM")}

    def in_template(self, tokenizer: Any, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        keys = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return tokenizer.apply_chat_template(messages, **keys)

    @property
    def is_distilled(self) -> bool:
        """Return whether the pipeline ignores the guidance scale, as its index says."""
        return bool(self.part_config("model_index").get("is_distilled", False))

    def branches(self, sampling: SamplingTable) -> int:
        return 1 if self.is_distilled else super().branches(sampling)

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes if self.is_distilled else super().with_negative(shapes)

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return functools.partial(call_transformer, None)


class Flux2(Flux2Dev):
    """FLUX.2-dev, which makes images of text."""


class Flux2Klein(Klein):
    """FLUX.2-klein, which makes images of text."""


class Flux2EditPolicy(SeveralInputsPolicy, Flux2Policy):
    """A loaded pipeline of FLUX.2 that gets reference images."""


class ReadsImages(ReadsSeveralInputs, Flux2Config):
    """What a family adds for reference images, which have the output's size."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = Flux2EditPolicy

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        inputs = input_shapes(self.latent_shape(configs["transformer"]), self.most_inputs)
        return super().conditioning_shapes(configs) | inputs


class Flux2Edit(ReadsImages, Flux2Dev):
    """FLUX.2-dev, which edits an input image, or reads several."""


class Flux2KleinEdit(ReadsImages, Klein):
    """FLUX.2-klein, which edits an input image, or reads several."""
