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
WAN_21_1_3B: Configs = WAN_21_14B | {
    "transformer": TRANSFORMER_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
}
