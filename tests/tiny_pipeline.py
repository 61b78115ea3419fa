"""A small Stable Diffusion with random weights in diffusers' own format, for tests that need no real images."""

from pathlib import Path
from typing import Any

import torch


def save_tiny_pipeline(
    folder: Path, seed: int = 0, pipeline: str = "StableDiffusionPipeline", in_channels: int = 4, **scheduler: object
) -> Path:
    """Write the pipeline. `scheduler` changes its DDIM configuration."""
    import diffusers
    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    config |= {"set_alpha_to_one": False, "steps_offset": 1, **scheduler}
    getattr(diffusers, pipeline)(
        vae=vae,
        text_encoder=_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        vocab_size=520,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(text)


def save_tiny_inpainting(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write a pipeline whose UNet reads a mask and a masked image as well."""
    return save_tiny_pipeline(folder, seed, "StableDiffusionInpaintPipeline", 9, **scheduler)


def tiny_tokenizer(max_length: int = 8) -> Any:
    """Return a tokenizer whose tokens are letters, 514 in all."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=max_length
    )
