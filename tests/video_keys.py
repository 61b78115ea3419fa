"""Other values of the keys of models of video, for tests."""

from typing import Any

from tests.changed_keys import ABSENT

WAN: dict[str, list[Any]] = {
    "patch_size": [[1, 4, 4], [1, 1, 1], [2, 2, 2]],
    "num_attention_heads": [1],
    "attention_head_dim": [16],
    "in_channels": [8],
    "out_channels": [8, None],
    "text_dim": [24],
    "freq_dim": [8],
    "ffn_dim": [16],
    "num_layers": [1],
    "cross_attn_norm": [False],
    "qk_norm": [None],
    "eps": [0.01],
    "image_dim": [16],
    "added_kv_proj_dim": [24],
    "rope_max_seq_len": [1, 64],
    "pos_embed_seq_len": [4],
    "unknown_key": [1],
}
WAN_DECODER: dict[str, list[Any]] = {
    "base_dim": [16],
    "decoder_base_dim": [16],
    "z_dim": [8],
    "dim_mult": [[1, 2, 1], [1, 1]],
    "num_res_blocks": [2],
    "attn_scales": [[1.0]],
    "temperal_downsample": [[False, True], [True, True, True]],
    "dropout": [0.5],
    "latents_mean": [[1.0, 0.0, 2.0, 0.0], [1.0], None, ABSENT],
    "latents_std": [[1.0, 3.0, 2.0, 1.0], [1.0, 0.0, 1.0, 1.0], None],
    "is_residual": [True],
    "in_channels": [1],
    "out_channels": [1],
    "patch_size": [2],
    "scale_factor_temporal": [2, ABSENT],
    "scale_factor_spatial": [8, ABSENT],
    "unknown_key": [1],
}
