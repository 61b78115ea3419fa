"""HunyuanImage 2.1 (Tencent 2025): two streams and one stream of tokens, with a ByT5 for the texts in quotation marks."""

import functools
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.families.masked_text import MaskedTextPolicy
from ray_ddpo.common.diffusion.families.published_parts import BOTH_STREAMS, QWEN_25_VL_7B
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.lora.adapters import LoraSettings
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable
from ray_ddpo.common.recipe.tables import SamplingTable

OWN_LATENT_SIZE = 64  # not in the configuration: images of 2048² pixels
GLYPH_TOKENS = 128  # bytes of the texts in quotation marks that the pipeline reads
TEXTS = ("prompt_embeds", "prompt_embeds_mask", "glyph_embeds", "glyph_embeds_mask")  # as `encode_prompt` returns them

# As diffusers' conversion script writes them. The ByT5 has tokens for fonts and colors too.
HUNYUAN_IMAGE_21: Configs = {
    "transformer": {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": 64,
        "out_channels": 64,
        "num_attention_heads": 28,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "rope_axes_dim": (64, 64),
    },
    "vae": {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 64,
        "block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "layers_per_block": 2,
        "spatial_compression_ratio": 32,
        "sample_size": 384,
        "scaling_factor": 0.75289,
    },
    "text_encoder": QWEN_25_VL_7B,
    "text_encoder_2": {
        "vocab_size": 1510,
        "d_model": 1472,
        "d_kv": 64,
        "d_ff": 3584,
        "num_layers": 12,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
}


def call_transformer(network: Any, latents: Tensor, timesteps: Tensor, **texts: Tensor) -> Tensor:
    """Return the transformer's velocity prediction per row. The masks in `texts` are above 0 at tokens of the prompt."""
    return network(latents, timesteps.to(latents.dtype), **texts)


def forward_joined(
    network: Any,
    latents: Float[Tensor, "B C H W"],
    timesteps: Float[Tensor, "B"],
    prompt_embeds: Float[Tensor, "B L D"],
    prompt_embeds_mask: Float[Tensor, "B L"],
    glyph_embeds: Float[Tensor, "B G D2"],
    glyph_embeds_mask: Float[Tensor, "B G"],
) -> Float[Tensor, "B C H W"]:
    """Compute what the network's own forward pass does, with text tokens in one order for all prompts.

    The pass of diffusers moves each prompt's filling to the end, with shapes that only values tell. Text tokens have no
    places, so their order changes nothing. That pass also cannot be computed again in the backward pass.
    """
    prompt_mask, glyph_mask = prompt_embeds_mask > 0, glyph_embeds_mask > 0
    turns, time = network.rope(latents), network.time_guidance_embed(timesteps)
    image = network.x_embedder(latents)
    text = network.context_embedder(prompt_embeds, timesteps, prompt_mask)
    text = torch.cat([network.context_embedder_2(glyph_embeds), text], dim=1)
    mask = torch.cat([glyph_mask.new_ones(image.shape[:2]), glyph_mask, prompt_mask], dim=1)[:, None, None]
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        if network.gradient_checkpointing and torch.is_grad_enabled():
            image, text = network._gradient_checkpointing_func(block, image, text, time, mask, turns)
        else:
            image, text = block(image, text, time, mask, turns)
    rows, columns = network.config.patch_size
    squares = network.proj_out(network.norm_out(image, time)).unflatten(-1, (-1, rows, columns))
    squares = squares.unflatten(1, (latents.shape[-2] // rows, latents.shape[-1] // columns))
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


class GlyphTokenizer:
    """A tokenizer that reads the texts in quotation marks of a prompt, as the pipeline writes them for the ByT5."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decode = tokenizer.decode

    def __call__(self, prompts: str | list[str], **keys: Any) -> Any:
        """Return the tokens of one prompt or of several."""
        from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

        if isinstance(prompts, str):
            return self._tokenizer(extract_glyph_text(prompts) or "", **keys)
        return self._tokenizer([extract_glyph_text(prompt) or "" for prompt in prompts], **keys)


class HunyuanImagePolicy(MaskedTextPolicy):
    """A loaded HunyuanImagePipeline."""

    config: "HunyuanImage"
    adds_shift: ClassVar[bool] = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pipeline.tokenizer_max_length = self.config.max_sequence_length

    def _table(self, sampling: SamplingTable) -> FlowMatchTable:
        return self._flow_table(sampling, 1, evenly_spaced=True)

    def _padded(self, text: str) -> Conditioning:
        rows = self.pipeline.encode_prompt(text, self.device)
        # Without a text in quotation marks the states are zeros in float32.
        return {name: row.to(rows[0].dtype) for name, row in zip(TEXTS, rows, strict=True)}

    def text_readers(self) -> list[TextReader]:
        glyphs = GlyphTokenizer(self.pipeline.tokenizer_2)
        return [
            TextReader("text_encoder", self.pipeline.tokenizer, self.config.max_sequence_length),
            TextReader("text_encoder_2", glyphs, GLYPH_TOKENS),
        ]


class HunyuanImage(DiffusersConfig):
    """HunyuanImage 2.1."""

    takes_sde: ClassVar[bool] = True
    policy_class: ClassVar[type[DiffusersPolicy]] = HunyuanImagePolicy
    pipeline_class: ClassVar[str] = "HunyuanImagePipeline"
    network_name: ClassVar[str] = "transformer"
    network_class: ClassVar[str] = "HunyuanImageTransformer2DModel"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKLHunyuanImage",)
    takes_diffusers_lora: ClassVar[bool] = False
    published: ClassVar[dict[str, Configs]] = {"hunyuanvideo-community/HunyuanImage-2.1-Diffusers": HUNYUAN_IMAGE_21}

    lora: LoraSettings = BOTH_STREAMS
    """LoRA adapters that are trained. By default rank 32 on the attention of both streams."""
    max_sequence_length: int = Field(default=1000, ge=1, le=1000)
    """Tokens of a prompt that the network reads, beside 128 of the texts in quotation marks."""

    @property
    def text_parts(self) -> dict[str, tuple[str, str]]:
        return {
            "text_encoder": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
            "text_encoder_2": ("T5Config", "T5EncoderModel"),
        }

    def pipeline_arguments(self, sampling: SamplingTable, size: tuple[int, int]) -> dict[str, Any]:
        arguments = super().pipeline_arguments(sampling, size)
        return {name: arguments[name] for name in arguments if name not in ("guidance_scale", "max_sequence_length")}

    def pipeline_lines(self, sampling: SamplingTable) -> list[str]:
        guider = f"ClassifierFreeGuidance(guidance_scale={max(sampling.guidance_scale, 1.0)})"
        return [
            "from diffusers import ClassifierFreeGuidance",
            f"pipeline.guider = pipeline.ocr_guider = {guider}",
            f"pipeline.tokenizer_max_length = {self.max_sequence_length}",
        ]

    @property
    def scale_factor(self) -> int:
        return self.part_config("vae")["spatial_compression_ratio"]

    @property
    def size_unit(self) -> int:
        return self.scale_factor * math.lcm(*self.part_config("transformer").get("patch_size", (1, 1)))

    def latent_shape(self, network_config: dict[str, Any]) -> tuple[int, ...]:
        return network_config["in_channels"], *self.latent_sides(OWN_LATENT_SIZE)

    def encoded(self, vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        in_tiles, vae.use_tiling = vae.use_tiling, False  # diffusers encodes tiles of videos only
        try:
            return super().encoded(vae, pixels, noise)
        finally:
            vae.use_tiling = in_tiles

    def set_up_network(self, network: Any) -> None:
        network.forward = functools.partial(forward_joined, network)

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        length, network = self.max_sequence_length, configs["transformer"]
        shapes = ((length, network["text_embed_dim"]), (length,), (GLYPH_TOKENS, network["text_embed_2_dim"]))
        return dict(zip(TEXTS, (*shapes, (GLYPH_TOKENS,)), strict=True))
