"""Small pipelines of the families of video, of diffusers' own classes. A latent is 4 × 4 pixels of 4 frames."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny_text_to_image import tiny_t5, tiny_t5_tokenizer

FRAMES = 5  # two frames of latents: the first one, and the next four


def save_tiny_wan(
    folder: Path, seed: int = 0, boundary_ratio: float | None = None, per_token: bool = False, **scheduler: object
) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, of a solver on a flow's noise levels.

    With a `boundary_ratio` it has two experts. If `per_token`, each token gets a timestep.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(seed)
    keys: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **scheduler}
    WanPipeline(
        transformer=_transformer(),
        transformer_2=None if boundary_ratio is None else _transformer(),
        boundary_ratio=boundary_ratio,
        expand_timesteps=per_token,
        scheduler=UniPCMultistepScheduler(**keys),
        vae=AutoencoderKLWan(**WAN_DECODER),
        text_encoder=_umt5(32),
        tokenizer=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_wan22(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline with two experts. Of 4 steps the first 3 are of the expert for high noise."""
    return save_tiny_wan(folder, seed, 0.7, False, **scheduler)


def save_tiny_wan_ti2v(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline of one network that may take a timestep for each token, as it is published: of text to video."""
    _clean_prompts_without_ftfy()
    return save_tiny_wan(folder, seed, None, True, **scheduler)


def save_tiny_wan_i2v(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, as for text to video."""
    torch.manual_seed(seed)
    network = _transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    return _save_from_images(folder, {"transformer": network}, True, scheduler)


def save_tiny_wan22_i2v(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline with two experts and without image encoder."""
    torch.manual_seed(seed)
    parts = {part: _transformer(in_channels=12) for part in ("transformer", "transformer_2")}
    return _save_from_images(folder, parts | {"boundary_ratio": 0.7}, False, scheduler)


def _save_from_images(folder: Path, parts: dict[str, Any], with_encoder: bool, scheduler: dict[str, Any]) -> Path:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline

    _clean_prompts_without_ftfy()
    keys: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **scheduler}
    WanImageToVideoPipeline(
        **parts,
        scheduler=UniPCMultistepScheduler(**keys),
        vae=AutoencoderKLWan(**WAN_DECODER),
        text_encoder=_umt5(32),
        tokenizer=tiny_t5_tokenizer(512 if with_encoder else 12),
        **(_image_encoder() if with_encoder else {}),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def _image_encoder() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "image_encoder": CLIPVisionModel(CLIPVisionConfig(**vision, image_size=8, patch_size=4)),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    }


def _clean_prompts_without_ftfy() -> None:
    """Let the pipeline from images clean prompts as that of text to video does: its own way needs ftfy."""
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    pipeline_wan_i2v.prompt_clean = pipeline_wan.prompt_clean


def _transformer(in_channels: int = 4, **keys: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        **keys,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


WAN_DECODER: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.2, 0.0, 0.3],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 4,
}


def save_tiny_ltx(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, of shifts by the number of tokens.

    A latent is 8 × 8 pixels of 4 frames.
    """
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(**LTX_DECODER)
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.7, 1.0, 2.0]))
    keys: Any = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    LTXPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**keys, "base_image_seq_len": 1024, **scheduler}),
        vae=vae,
        text_encoder=tiny_t5(32),
        tokenizer=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


LTX_DECODER: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 2,
}


def _umt5(width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    keys: Any = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(**keys, feed_forward_proj="gated-gelu"))
