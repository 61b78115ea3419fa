"""Other values of each configuration key of each part for tests: values that diffusers accepts, or nearly."""

from typing import Any

from tests.changed_keys import ABSENT, Change
from tests.image_keys import GEMMA_2, HUNYUAN_DECODER, HUNYUAN_IMAGE, HUNYUAN_INDEX, LUMINA, PIXART, SANA, SANA_DECODER
from tests.video_keys import (
    EXPERT,
    EXPERTS_INDEX,
    FLOW_SOLVER,
    IMAGE_ENCODER,
    IMAGE_PROCESSOR,
    LTX,
    LTX_DECODER,
    UNIPC,
    WAN,
    WAN_DECODER,
    WAN_FROM_IMAGES,
)

UNET: dict[str, list[Any]] = {
    "center_input_sample": [True],
    "flip_sin_to_cos": [False],
    "freq_shift": [1],
    "mid_block_type": ["UNetMidBlock2D", None],
    "only_cross_attention": [True, [True, False]],
    "layers_per_block": [2, [1, 2]],
    "downsample_padding": [0],
    "mid_block_scale_factor": [2.0],
    "dropout": [0.5],
    "act_fn": ["gelu", "mish"],
    "norm_num_groups": [4, None],
    "norm_eps": [0.01],
    "cross_attention_dim": [24, [16, 16], [40, 40]],
    "transformer_layers_per_block": [2, [1, 2]],
    "encoder_hid_dim": [16, 40, 20],
    "encoder_hid_dim_type": ["text_proj", "image_proj", "text_image_proj", "ip_image_proj"],
    "attention_head_dim": [4, [2, 8]],
    "num_attention_heads": [2],
    "dual_cross_attention": [True],
    "use_linear_projection": [True, False],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "num_class_embeds": [10],
    "addition_embed_type": ["text", "text_time", "image", "text_image", "image_hint", None],
    "addition_time_embed_dim": [16, None],
    "projection_class_embeddings_input_dim": [16],
    "upcast_attention": [True, None],
    "resnet_time_scale_shift": ["scale_shift"],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [2.0],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [32],
    "time_embedding_act_fn": ["silu"],
    "timestep_post_act": ["silu"],
    "time_cond_proj_dim": [8],
    "conv_in_kernel": [1],
    "conv_out_kernel": [1],
    "attention_type": ["gated"],
    "mid_block_only_cross_attention": [True],
    "cross_attention_norm": ["layer_norm"],
    "sample_size": [4, 16],
    "in_channels": [9],
    "out_channels": [8, 1],
    "block_out_channels": [[8, 16]],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}],
    "unknown_key": [3],
}
DECODER: dict[str, list[Any]] = {
    "scaling_factor": [0.5],
    "shift_factor": [0.3, None],
    "latents_mean": [[1.0, 0.0, 2.0, 0.0]],
    "latents_std": [[1.0, 3.0, 2.0, 1.0]],
    "force_upcast": [False],
    "block_out_channels": [[8, 16], [16, 16, 16, 16]],
    "latent_channels": [8],
    "act_fn": ["gelu"],
    "layers_per_block": [2],
    "use_quant_conv": [False, True],
    "use_post_quant_conv": [False, True],
    "mid_block_add_attention": [False],
    "out_channels": [4, 1],
    "unknown_key": [1],
}
TINY_DECODER: dict[str, list[Any]] = {
    "scaling_factor": [0.5],
    "shift_factor": [0.3, None],
    "latent_magnitude": [5],
    "latent_shift": [0.2],
    "upsample_fn": ["bilinear"],
    "upsampling_scaling_factor": [4],
    "act_fn": ["gelu"],
    "latent_channels": [8],
    "force_upcast": [True],
    "decoder_block_out_channels": [[8, 8, 8], [4, 4]],
    "encoder_block_out_channels": [[16, 16]],
    "num_decoder_blocks": [[2, 1]],
    "out_channels": [1],
}
CLIP: dict[str, list[Any]] = {
    "eos_token_id": [2, 5],
    "hidden_act": ["gelu"],
    "projection_dim": [20],
    "hidden_size": [32],
    "num_hidden_layers": [1, 3],
    "layer_norm_eps": [0.1],
    "max_position_embeddings": [7, 12],
    "use_attention_mask": [True],
    "intermediate_size": [20],
    "vocab_size": [600, 500],
    "return_dict": [False],
    "output_hidden_states": [True],
    "attention_dropout": [0.3],
    "num_attention_heads": [4, 3],
}
TOKENIZER: dict[str, list[Any]] = {
    "model_max_length": [6, 12, ABSENT],
    "padding_side": ["left"],
    "pad_token": ["!"],
    "eos_token": ["!"],
    "truncation_side": ["left"],
}
T5: dict[str, list[Any]] = {"d_model": [24], "num_layers": [2], "feed_forward_proj": ["relu"], "d_ff": [30]}
T5 |= {"layer_norm_epsilon": [0.1], "relative_attention_num_buckets": [8], "dropout_rate": [0.5], "vocab_size": [80]}
T5_TOKENIZER: dict[str, list[Any]] = {"model_max_length": [6, ABSENT], "padding_side": ["left"]}
DDIM: dict[str, list[Any]] = {
    "beta_end": [0.02],
    "set_alpha_to_one": [True],
    "steps_offset": [0, 5],
    "prediction_type": ["v_prediction"],
    "timestep_spacing": ["trailing", "linspace"],
    "clip_sample": [True],
    "thresholding": [True],
    "use_karras_sigmas": [True],
}
FLOW: dict[str, list[Any]] = {
    "shift": [1.0, ABSENT],
    "use_dynamic_shifting": [True, False],
    "max_shift": [2.0],
    "shift_terminal": [0.1],
    "use_karras_sigmas": [True],
    "time_shift_type": ["linear"],
    "stochastic_sampling": [True],
}
INDEX: dict[str, list[Any]] = {
    "requires_safety_checker": [True],
    "force_zeros_for_empty_prompt": [False],
    "add_watermarker": [True, False],
    "unknown_key": [1],
}
SD3: dict[str, list[Any]] = {
    "sample_size": [4],
    "patch_size": [1, 4],
    "in_channels": [8],
    "num_layers": [1],
    "attention_head_dim": [4],
    "joint_attention_dim": [24],
    "caption_projection_dim": [8],
    "pooled_projection_dim": [20],
    "out_channels": [8, None],
    "pos_embed_max_size": [4, 16],
    "dual_attention_layers": [[], [1]],
    "qk_norm": [None],
}
FLUX: dict[str, list[Any]] = {
    "patch_size": [2],
    "in_channels": [64, 18],
    "out_channels": [4, 16],
    "num_layers": [2],
    "num_single_layers": [2],
    "num_attention_heads": [4],
    "joint_attention_dim": [24],
    "pooled_projection_dim": [20],
    "guidance_embeds": [False],
    "axes_dims_rope": [[6, 4, 6], [4, 4, 4]],
}
QWEN_IMAGE: dict[str, list[Any]] = {
    "patch_size": [1],
    "in_channels": [64],
    "out_channels": [8, None],
    "num_layers": [1],
    "attention_head_dim": [32],
    "num_attention_heads": [4],
    "joint_attention_dim": [24],
    "guidance_embeds": [True],
    "axes_dims_rope": [[6, 6, 4]],
    "zero_cond_t": [True],
    "use_additional_t_cond": [True],
    "use_layer3d_rope": [True],
    "unknown_key": [1],
}
QWEN_DECODER: dict[str, list[Any]] = {
    "latents_mean": [[1.0, 0.0, 2.0, 0.0], [1.0], None],
    "latents_std": [[1.0, 3.0, 2.0, 1.0], [1.0, 0.0, 1.0, 1.0]],
    "z_dim": [8],
    "num_res_blocks": [2],
    "dim_mult": [[1, 2]],
    "temperal_downsample": [[True]],
    "input_channels": [4],
    "scaling_factor": [0.5],
}
QWEN_TEXT: dict[str, list[Any]] = {"tie_word_embeddings": [True], "vision_start_token_id": [3]}
QWEN_TOKENIZER: dict[str, list[Any]] = {"model_max_length": [20, ABSENT], "padding_side": ["left"], "pad_token": ["!"]}
FLUX2: dict[str, list[Any]] = {
    "patch_size": [2],
    "in_channels": [64, 18],
    "out_channels": [4, 16],
    "num_layers": [2],
    "num_single_layers": [2],
    "attention_head_dim": [32],
    "num_attention_heads": [4],
    "joint_attention_dim": [24],
    "timestep_guidance_channels": [128],
    "mlp_ratio": [2.0],
    "axes_dims_rope": [[8, 4, 2, 2], [4, 4, 4, 8]],
    "rope_theta": [1000],
    "eps": [0.01],
    "guidance_embeds": [True, False],
    "unknown_key": [1],
}
FLUX2_DECODER: dict[str, list[Any]] = {
    "batch_norm_eps": [0.1, "x"],
    "patch_size": [[1, 1]],
    "latent_channels": [8],
    "block_out_channels": [[8, 16]],
    "decoder_block_out_channels": [[8, 16]],
    "layers_per_block": [2],
    "act_fn": ["gelu"],
    "use_quant_conv": [False],
    "use_post_quant_conv": [False],
    "mid_block_add_attention": [False],
    "out_channels": [4],
    "scaling_factor": [0.5],
}
Z_IMAGE: dict[str, list[Any]] = {
    "all_patch_size": [[1], [2, 4]],
    "all_f_patch_size": [[2]],
    "in_channels": [8],
    "dim": [64],
    "n_layers": [2],
    "n_refiner_layers": [2],
    "n_heads": [1],
    "n_kv_heads": [1],
    "norm_eps": [0.01],
    "qk_norm": [False],
    "cap_feat_dim": [24],
    "siglip_feat_dim": [16],
    "rope_theta": [1000.0],
    "t_scale": [500.0],
    "axes_dims": [[6, 4, 6]],
    "axes_lens": [[64, 32, 32], [256, 32, 32]],
    "unknown_key": [1],
}
QWEN3_TEXT: dict[str, list[Any]] = {
    "hidden_size": [24],
    "num_hidden_layers": [1, 3],
    "hidden_act": ["gelu"],
    "rms_norm_eps": [0.1],
    "num_key_value_heads": [2],
    "attention_bias": [True],
    "vocab_size": [600],
    "tie_word_embeddings": [True],
}
CHAT_TOKENIZER = {
    "model_max_length": [20, ABSENT],
    "padding_side": ["left"],
    "pad_token": ["!"],
    "chat_template": ["{{ messages[0]['content'] }}!"],
}
UNET_PARTS: dict[str, dict[str, list[Any]]] = {"unet": UNET, "scheduler": DDIM, "model_index": INDEX}
FLOW_PARTS: dict[str, dict[str, list[Any]]] = {
    "vae": DECODER,
    "scheduler": FLOW,
    "text_encoder": CLIP,
    "tokenizer": TOKENIZER,
}
# Without torchvision no Qwen2VLProcessor of transformers can be loaded, so both sides read this part by one class.
PROCESSOR: dict[str, list[Any]] = {"patch_size": [7], "merge_size": [1], "temporal_patch_size": [1]}
PROCESSOR |= {"image_mean": [[0.1, 0.2, 0.3]], "do_rescale": [False], "do_resize": [False], "resample": [0]}
PROCESSOR |= {"image_std": [[0.5, 0.6, 0.7]], "do_normalize": [False], "rescale_factor": [0.01], "max_pixels": [3136]}
PROCESSOR |= {"do_convert_rgb": [False], "unknown_key": [1]}
PROCESSOR |= {"size": [{"shortest_edge": 12544, "longest_edge": 1003520}], "min_pixels": [12544]}
QWEN_EDIT = {"transformer": QWEN_IMAGE, "vae": QWEN_DECODER, "scheduler": FLOW, "text_encoder": QWEN_TEXT}
QWEN_EDIT |= {"tokenizer": QWEN_TOKENIZER, "processor": PROCESSOR}
DEV = {"transformer": FLUX2, "vae": FLUX2_DECODER, "scheduler": FLOW, "tokenizer": CHAT_TOKENIZER}
KLEIN = DEV | {"text_encoder": QWEN3_TEXT, "model_index": {"is_distilled": [True, None]}}
PARTS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "stable_diffusion": UNET_PARTS | {"vae": TINY_DECODER, "text_encoder": CLIP, "tokenizer": TOKENIZER},
    "sdxl": UNET_PARTS
    | {"vae": DECODER, "text_encoder": CLIP, "text_encoder_2": CLIP, "tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER},
    "sd3": FLOW_PARTS
    | {"transformer": SD3, "text_encoder_2": CLIP, "text_encoder_3": T5, "tokenizer_2": TOKENIZER}
    | {"tokenizer_3": T5_TOKENIZER},
    "sd_inpainting": UNET_PARTS
    | {"unet": UNET | {"in_channels": [4, 8]}, "vae": TINY_DECODER, "text_encoder": CLIP, "tokenizer": TOKENIZER},
    "flux": FLOW_PARTS | {"transformer": FLUX, "text_encoder_2": T5, "tokenizer_2": T5_TOKENIZER},
    "flux_kontext": FLOW_PARTS | {"transformer": FLUX, "text_encoder_2": T5, "tokenizer_2": T5_TOKENIZER},
    "qwen_image_edit": QWEN_EDIT,
    "qwen_image_edit_plus": QWEN_EDIT,
    "qwen_image": {"transformer": QWEN_IMAGE, "vae": QWEN_DECODER, "scheduler": FLOW, "text_encoder": QWEN_TEXT}
    | {"tokenizer": QWEN_TOKENIZER},
    "flux2": DEV,
    "flux2_klein": KLEIN,
    "flux2_edit": DEV,
    "flux2_klein_edit": KLEIN,
    "z_image": {"transformer": Z_IMAGE, "vae": DECODER, "scheduler": FLOW, "text_encoder": QWEN3_TEXT}
    | {"tokenizer": CHAT_TOKENIZER},
    "hunyuan_image": {"transformer": HUNYUAN_IMAGE, "vae": HUNYUAN_DECODER, "scheduler": FLOW, "text_encoder_2": T5}
    | {"text_encoder": QWEN_TEXT, "tokenizer": QWEN_TOKENIZER, "tokenizer_2": T5_TOKENIZER}
    | {"model_index": HUNYUAN_INDEX},
    "lumina2": {"transformer": LUMINA, "vae": DECODER, "text_encoder": GEMMA_2, "tokenizer": QWEN_TOKENIZER}
    | {"scheduler": FLOW | {"num_train_timesteps": [500]}},
    "pixart_sigma": {"transformer": PIXART, "vae": DECODER, "scheduler": DDIM, "text_encoder": T5}
    | {"tokenizer": T5_TOKENIZER},
    "sana": {"transformer": SANA, "vae": SANA_DECODER, "scheduler": FLOW_SOLVER, "text_encoder": GEMMA_2}
    | {"tokenizer": QWEN_TOKENIZER},
    "wan": {"transformer": WAN, "vae": WAN_DECODER, "scheduler": UNIPC, "text_encoder": T5, "tokenizer": T5_TOKENIZER}
    | {"model_index": {"boundary_ratio": [0.5], "expand_timesteps": [True, None]}},
    "wan22": {"transformer": WAN, "transformer_2": EXPERT, "scheduler": UNIPC, "model_index": EXPERTS_INDEX},
    "wan_i2v": {"transformer": WAN_FROM_IMAGES, "vae": WAN_DECODER, "scheduler": UNIPC, "text_encoder": T5}
    | {"tokenizer": {"padding_side": ["left"]}, "image_encoder": IMAGE_ENCODER, "image_processor": IMAGE_PROCESSOR}
    | {"model_index": {"boundary_ratio": [0.5], "expand_timesteps": [True]}},
    "wan22_i2v": {"transformer": WAN_FROM_IMAGES, "transformer_2": EXPERT, "model_index": EXPERTS_INDEX},
    "wan_ti2v": {"transformer": WAN, "vae": WAN_DECODER, "scheduler": UNIPC}
    | {"model_index": {"boundary_ratio": [0.5], "expand_timesteps": [False, None]}},
    "ltx": {"transformer": LTX, "vae": LTX_DECODER, "scheduler": FLOW, "text_encoder": T5, "tokenizer": T5_TOKENIZER},
}
PARTS_OF_FAMILIES = [(name, part) for name, parts in PARTS.items() for part in parts]
EVERY = [
    (name, Change(part, key, value))
    for name, parts in PARTS.items()
    for part, keys in parts.items()
    for key, values in keys.items()
    for value in values
]
