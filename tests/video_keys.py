"""Other values of the keys of models of video, and of solvers whose noise levels are a flow's, for tests."""

from typing import Any

from tests.changed_keys import ABSENT

FLOW_SOLVER: dict[str, list[Any]] = {
    "flow_shift": [1.0, 6.0, 0.0, None, ABSENT],
    "use_flow_sigmas": [False, ABSENT],
    "prediction_type": ["epsilon", "v_prediction", ABSENT],
    "num_train_timesteps": [500],
    "solver_order": [1, 3],
    "solver_type": ["heun"],
    "lower_order_final": [False],
    "euler_at_final": [True],
    "final_sigmas_type": ["sigma_min"],
    "timestep_spacing": ["trailing", "leading"],
    "beta_end": [0.5],
    "use_karras_sigmas": [True],
    "use_lu_lambdas": [True],
    "thresholding": [True],
    "variance_type": ["learned", "fixed_small"],
    "use_dynamic_shifting": [True],
    "algorithm_type": ["sde-dpmsolver++"],
}
UNIPC = {key: values for key, values in FLOW_SOLVER.items() if key not in ("use_lu_lambdas", "variance_type")} | {
    "algorithm_type": [ABSENT],
    "euler_at_final": [ABSENT],
    "solver_type": ["midpoint"],
    "predict_x0": [False],
    "shift_terminal": [0.1],
    "disable_corrector": [[0]],
}
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
