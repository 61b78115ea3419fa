"""A small pipeline of HunyuanImage with random weights, of diffusers' own classes and in their format."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny_language_models import QWEN_IMAGE_TEMPLATE, tiny_qwen_tokenizer, tiny_qwen_vl

TEMPLATE = QWEN_IMAGE_TEMPLATE.removesuffix("\n<|im_start|>assistant\n")
DECODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 2,
    "sample_size": 8,
    "scaling_factor": 0.75,
}


def save_tiny_hunyuan_image(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline, with the guiders of the published one. `scheduler` changes its configuration."""
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer: Any = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    with torch.no_grad():  # a text changes images clearly, although image tokens stand beside it
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            (getattr(block.attn, "add_v_proj", None) or block.attn.to_v).weight.mul_(8)
    keys: Any = {"shift": 5.0, **scheduler}
    tokenizer = tiny_qwen_tokenizer(TEMPLATE, 34)
    byt5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    HunyuanImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKLHunyuanImage(**DECODER),
        text_encoder=tiny_qwen_vl(32, tokenizer, layers=3),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(byt5),
        tokenizer_2=ByT5Tokenizer(),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38),
    ).save_pretrained(folder, safe_serialization=True)
    return folder
