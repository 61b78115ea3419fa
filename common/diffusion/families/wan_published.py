"""The architectures of the published models of Wan, as in their configuration files."""

from typing import Any

from ray_ddpo.common.diffusion.families.published_parts import T5_XXL
from ray_ddpo.common.diffusion.loading.model_sizes import Configs

UMT5_XXL = T5_XXL | {"vocab_size": 256384}  # google/umt5-xxl's encoder
TRANSFORMER_14B: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
WAN_21_14B: Configs = {
    "transformer": TRANSFORMER_14B,
    "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
    "text_encoder": UMT5_XXL,
}
# The experts are alike, and so are their files. A scheduler's file tells which steps belong to which.
WAN_22_A14B: Configs = WAN_21_14B | {
    "scheduler": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "model_index": {"boundary_ratio": 0.875},
}
WAN_22_I2V_A14B: Configs = WAN_22_A14B | {
    "transformer": TRANSFORMER_14B | {"in_channels": 36},
    "model_index": {"boundary_ratio": 0.9},
}
WAN_22_5B: Configs = {
    "transformer": TRANSFORMER_14B
    | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    "vae": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,  # the published numbers do not change a size
        "latents_std": [1.0] * 48,
    },
    "text_encoder": UMT5_XXL,
}
WAN_21_I2V_14B: Configs = WAN_21_14B | {
    "transformer": TRANSFORMER_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "image_encoder": {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K's image tower
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
WAN_21_1_3B: Configs = WAN_21_14B | {
    "transformer": TRANSFORMER_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
}
