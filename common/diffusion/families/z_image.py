"""Z-Image (Tongyi Lab 2025, arXiv 2511.22699): one stream of image and text tokens, with flow matching."""

import functools
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.masked_text import MaskedTextPolicy, masked_rows
from ray_ddpo.common.diffusion.families.one_stream import patches, places, through, unpatched
from ray_ddpo.common.diffusion.families.packing import PATCH
from ray_ddpo.common.diffusion.families.published_parts import FLOW_AUTOENCODER, QWEN_3_4B
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader, tokens_before
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 128  # not in the configuration: images of 1024² pixels
MULTIPLE = 32  # of tokens: diffusers fills image and prompt up to it, with weights of their own that are attended to
PATCHES = f"{PATCH}-1"  # the network's name of its layers for patches of one frame

# As in the configuration files of Tongyi-MAI/Z-Image and Z-Image-Turbo, which differ in their schedulers only.
Z_IMAGE: Configs = {
    "transformer": {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    "vae": FLOW_AUTOENCODER | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": QWEN_3_4B,
}


def filled(tokens: int) -> int:
    """Return the length that diffusers fills a sequence up to."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_embeds_mask: Tensor
) -> Tensor:
    """Return the velocity prediction per row. The network's time goes from 0 to 1, and it predicts x0 − ε."""
    return -network(latents, (1000 - timesteps) / 1000, prompt_embeds, prompt_embeds_mask)


def forward_padded(
    network: Any,
    latents: Float[Tensor, "B C H W"],
    times: Float[Tensor, "B"],
    prompt_embeds: Float[Tensor, "B L D"],
    prompt_embeds_mask: Float[Tensor, "B L"],
) -> Float[Tensor, "B C H W"]:
    """Compute what the network's own forward pass does, with prompts padded to one length in place of lists.

    The pass of diffusers has shapes that depend on the prompts of the batch. So would the last bits of each row.
    """
    height, width = (side // PATCH for side in latents.shape[-2:])
    time = network.t_embedder(times * network.t_scale).type_as(latents)
    is_read, text_places, image_places = _places(prompt_embeds_mask, height, width)
    image_turns, text_turns = _turns(network, image_places), _turns(network, text_places)
    image = network.all_x_embedder[PATCHES](patches(latents, PATCH))
    fill = network.x_pad_token.expand(len(latents), filled(height * width) - height * width, -1)
    image = torch.cat([image, fill.to(image.dtype)], dim=1)
    image = through(network, network.noise_refiner, image, None, image_turns, time)
    text = network.cap_embedder(prompt_embeds)
    text = torch.where(prompt_embeds_mask.unsqueeze(-1) > 0, text, network.cap_pad_token.to(text.dtype))
    text = through(network, network.context_refiner, text, is_read, text_turns)
    joined, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
    mask = torch.cat([is_read.new_ones(image.shape[:2]), is_read], dim=1)
    joined = through(network, network.layers, joined, mask, turns, time)
    tokens = network.all_final_layer[PATCHES](joined, c=time)[:, : height * width]
    return unpatched(tokens, latents, PATCH)


def _places(
    mask: Float[Tensor, "B L"], height: int, width: int
) -> tuple[Bool[Tensor, "B L"], Int[Tensor, "B L 3"], Int[Tensor, "B L2 3"]]:
    """Return which text tokens are read, and (frame, row, column) of text and image tokens.

    Text is at frames 1, 2, … with its filling; the image is at the frame behind them, and its filling at 0.
    """
    ends = -(-(mask > 0).sum(1, keepdim=True) // MULTIPLE) * MULTIPLE
    frames = torch.arange(mask.shape[1], device=mask.device)
    text, image = places(frames + 1, ends + 1, height, width)
    return frames < ends, text, torch.nn.functional.pad(image, (0, 0, 0, filled(height * width) - height * width))


def _turns(network: Any, places: Int[Tensor, "B L 3"]) -> Tensor:
    """Return the rotary embedding of places, as complex numbers."""
    return network.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2])


class ZImagePolicy(MaskedTextPolicy):
    """A loaded ZImagePipeline."""

    config: "ZImage"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # The tables of rotary angles are made in the first call, in a way that cannot be compiled.
        self.network.rope_embedder(torch.zeros(1, 3, device=self.device, dtype=torch.long))

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, PATCH, evenly_spaced=True)

    def _padded(self, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        (embeds,), _ = self.pipeline.encode_prompt(text, self.device, False, max_sequence_length=length)
        return masked_rows(embeds.unsqueeze(0), filled(length))

    def text_readers(self) -> list[TextReader]:
        tokenizer = self.pipeline.tokenizer
        template = functools.partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        before = tokens_before(tokenizer, lambda text: template([{"role": "user", "content": text}]))
        return [TextReader("text_encoder", tokenizer, self.config.max_sequence_length - before)]

    def _combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        return conditional + guidance_scale * (conditional - unconditional)


class ZImage(DiffusersConfig):
    """Z-Image and Z-Image-Turbo. A guidance scale w is w + 1 in other families."""

    takes_sde: ClassVar[bool] = True
    guided_above: ClassVar[float] = 0.0
    policy_class: ClassVar[type[DiffusersPolicy]] = ZImagePolicy
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "ZImageTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    published: ClassVar[dict[str, Configs]] = dict.fromkeys(("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"), Z_IMAGE)

    lora: LoraSettings = LoraSettings(rank=32, alpha=64)
    """LoRA adapters that are trained. By default rank 32 on the attention."""
    max_sequence_length: int = Field(default=512, ge=1, le=992)
    """Tokens of a prompt and its template that the text encoder reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Qwen3Config", "Qwen3Model")}

    @property
    def size_unit(self) -> int:
        return self.scale_factor * PATCH

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"], *self.latent_sides(OWN_LATENT_SIZE)

    def set_up_network(self, network: Any) -> None:
        network.forward = functools.partial(forward_padded, network)

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        length = filled(self.max_sequence_length)
        return {"prompt_embeds": (length, configs["transformer"]["cap_feat_dim"]), "prompt_embeds_mask": (length,)}
