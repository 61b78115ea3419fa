"""Other values of the keys of HunyuanImage's and Lumina 2's parts, as tests/key_candidates.py has them."""

from typing import Any

from tests.changed_keys import ABSENT

HUNYUAN_IMAGE: dict[str, list[Any]] = {
    "patch_size": [[2, 2], [1, 2], [1, 1, 1]],
    "in_channels": [8],
    "out_channels": [8, None],
    "num_attention_heads": [4],
    "attention_head_dim": [32],
    "num_layers": [2],
    "num_single_layers": [2],
    "num_refiner_layers": [2],
    "mlp_ratio": [2.0],
    "qk_norm": ["layer_norm", None],
    "guidance_embeds": [True],
    "text_embed_dim": [24],
    "text_embed_2_dim": [24, None],
    "rope_theta": [1000.0],
    "rope_axes_dim": [[4, 12], [4, 4], [8]],
    "use_meanflow": [True],
    "unknown_key": [1],
}
HUNYUAN_DECODER: dict[str, list[Any]] = {
    "in_channels": [4],
    "out_channels": [4, 1],
    "latent_channels": [8],
    "block_out_channels": [[32, 64], [32], [32, 32, 32]],
    "layers_per_block": [2],
    "spatial_compression_ratio": [1, 3, 4, 0, None],
    "sample_size": [4],
    "scaling_factor": [0.5, 0, None, ABSENT],
    "downsample_match_channel": [False],
    "upsample_match_channel": [False],
    "shift_factor": [0.3],
}
HUNYUAN_INDEX: dict[str, list[Any]] = {
    "guider": [["diffusers", "PerturbedAttentionGuidance"], ["diffusers", "ClassifierFreeGuidance"], [None, None]],
    "ocr_guider": [["diffusers", "AutoGuidance"], [None, None], ABSENT],
}
LUMINA: dict[str, list[Any]] = {
    "sample_size": [8],
    "patch_size": [1, 4],
    "in_channels": [8],
    "out_channels": [8],
    "hidden_size": [48],
    "num_layers": [2],
    "num_refiner_layers": [2],
    "num_attention_heads": [1],
    "num_kv_heads": [2],
    "multiple_of": [32],
    "ffn_dim_multiplier": [0.5],
    "norm_eps": [0.01],
    "scaling_factor": [2.0],
    "axes_dim_rope": [[6, 2, 4], [4, 4, 8]],
    "axes_lens": [[20, 16, 16], [10, 16, 16], [40, 1, 16]],
    "cap_feat_dim": [24],
    "unknown_key": [1],
}
