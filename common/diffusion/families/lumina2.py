"""Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758): one stream of image and text tokens, with a Gemma 2."""

import functools
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import MASKED_EMBEDDINGS, DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.one_stream import patches, places, through, unpatched
from ray_ddpo.common.diffusion.families.packing import PATCH
from ray_ddpo.common.diffusion.families.published_parts import FLOW_AUTOENCODER, GEMMA_2_2B
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

PLACES = (300, 512, 512)  # diffusers' default for the network: frames, rows and columns

# As in the configuration files of Alpha-VLLM/Lumina-Image-2.0.
LUMINA_2: Configs = {
    "transformer": {"_class_name": "Lumina2Transformer2DModel", "cap_feat_dim": 2304},
    "vae": FLOW_AUTOENCODER | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": GEMMA_2_2B,
}


def call_transformer(
    network: Any, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, prompt_attention_mask: Tensor
) -> Tensor:
    """Return the velocity prediction per row. The network's time goes from 0 to 1, and it predicts x0 − ε."""
    return -network(latents, 1 - timesteps / 1000, prompt_embeds, prompt_attention_mask)


def forward_padded(
    network: Any,
    latents: Float[Tensor, "B C H W"],
    times: Float[Tensor, "B"],
    prompt_embeds: Float[Tensor, "B L D"],
    prompt_attention_mask: Num[Tensor, "B L"],
) -> Float[Tensor, "B C H W"]:
    """Compute what the network's own forward pass does, with prompts of one length.

    The pass of diffusers has shapes that depend on the prompts of the batch. So would the last bits of each row.
    """
    patch, is_read = network.config.patch_size, prompt_attention_mask > 0
    time, text = network.time_caption_embed(latents, times, prompt_embeds)
    image = network.x_embedder(patches(latents, patch))
    frames = torch.arange(text.shape[1], device=text.device)
    sides = (side // patch for side in latents.shape[-2:])
    text_places, image_places = places(frames, is_read.sum(1, keepdim=True), *sides)
    text_turns, image_turns = map(network.rope_embedder._get_freqs_cis, (text_places, image_places))
    text = through(network, network.context_refiner, text, is_read, text_turns)
    image = through(network, network.noise_refiner, image, None, image_turns, time)
    joined, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
    mask = torch.cat([is_read.new_ones(image.shape[:2]), is_read], dim=1)
    joined = network.norm_out(through(network, network.layers, joined, mask, turns, time), time)
    return unpatched(joined[:, : image.shape[1]], latents, patch)


class Lumina2Policy(DiffusersPolicy):
    """A loaded Lumina2Pipeline."""

    config: "Lumina2"
    embeddings: ClassVar[tuple[str, ...]] = MASKED_EMBEDDINGS
    default_negative: ClassVar[str | None] = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        embedder = self.network.rope_embedder  # whose tables are no buffers, so that each pass would copy them
        embedder.freqs_cis = [table.to(self.device) for table in embedder.freqs_cis]

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        scheduler = self.pipeline.scheduler.config
        # The pipeline takes the number of channels for that of image tokens.
        shift = calculate_shift(self.latent_shape[0], *(scheduler[key] for key in keys))
        return self._flow_table(sampling, PATCH, evenly_spaced=True, shift=shift)

    def _encode(self, prompt: str, with_negative: bool, **keys: Any) -> Conditioning:
        return super()._encode(prompt, with_negative, max_sequence_length=self.config.max_sequence_length, **keys)

    def text_readers(self) -> list[TextReader]:
        tokenizer, texts = self.pipeline.tokenizer, (f"{self.pipeline.system_prompt} <Prompt Start> a", "a")
        with_system, alone = (len(tokenizer(text)["input_ids"]) for text in texts)
        before = with_system - alone
        return [TextReader("text_encoder", tokenizer, self.config.max_sequence_length - before, template=before)]

    def _combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        guided = super()._combined(unconditional, conditional, guidance_scale)
        # As in the pipeline: each row of latents gets the norm that it has in the conditional prediction.
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class Lumina2(DiffusersConfig):
    """Lumina-Image 2.0."""

    takes_sde: ClassVar[bool] = True
    policy_class: ClassVar[type[DiffusersPolicy]] = Lumina2Policy
    pipeline_class: ClassVar[str] = "Lumina2Pipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "Lumina2Transformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    published: ClassVar[dict[str, Configs]] = {"Alpha-VLLM/Lumina-Image-2.0": LUMINA_2}

    lora: LoraSettings = LoraSettings(rank=32, alpha=64)
    """LoRA adapters that are trained. By default rank 32 on the attention."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """Tokens of a prompt and the system prompt before it that the text encoder reads."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {"text_encoder": ("Gemma2Config", "Gemma2Model")}

    @property
    def size_unit(self) -> int:
        patch = self.part_config("transformer").get("patch_size", PATCH)
        return self.scale_factor * math.lcm(PATCH, patch)  # the pipeline makes latents by twos

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"], *self.latent_sides(network_config.get("sample_size", 128))

    def check_size(self) -> None:
        super().check_size()
        network = self.part_config("transformer")
        frames, *sides = network.get("axes_lens", PLACES)
        if self.max_sequence_length >= frames:
            raise ValueError(
                f"policy.max_sequence_length is {self.max_sequence_length}: this model has places for {frames - 1} tokens "
                "(axes_lens in transformer/config.json)"
            )
        largest = self.scale_factor * network.get("patch_size", PATCH) * min(sides)
        for key, given in self.given_sizes.items():
            if any(side is not None and side > largest for side in given):
                raise ValueError(f"policy.{key} is {given[0] or given[1]}: this model has places for {largest} pixels")

    def set_up_network(self, network: Any) -> None:
        network.forward = functools.partial(forward_padded, network)

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {
            "prompt_embeds": (tokens, configs["transformer"]["cap_feat_dim"]),
            "prompt_attention_mask": (tokens,),
        }
