"""Configurations of text encoders and decoders that published models share, and of adapters that recipes share."""

from typing import Any

from ray_ddpo.common.diffusion.lora.adapters import LoraSettings

# Flow-GRPO's adapter for SD 3.5 (Liu et al. 2025), which has the text's projections too.
BOTH_STREAMS = LoraSettings(
    rank=32,
    alpha=64,
    target_modules=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
)
WIDE_ADAPTERS = LoraSettings(rank=32, alpha=64)  # the same on the projections that attention has in every network
CLIP_L = {  # openai/clip-vit-large-patch14's text tower
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_BIG_G = {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k's
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {  # google/t5-v1_1-xxl's encoder
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
AUTOENCODER: dict[str, Any] = {  # Stable Diffusion 1, 2 and XL
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
FLOW_AUTOENCODER = AUTOENCODER | {  # SD3 and FLUX
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN_3_4B: dict[str, Any] = {  # Qwen/Qwen3-4B
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN_25_VL_7B: dict[str, Any] = {  # Qwen/Qwen2.5-VL-7B-Instruct
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
GEMMA_2_2B = {  # google/gemma-2-2b
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
