"""Small pipelines of the families of video, of diffusers' own classes. A latent is 4 × 4 pixels of 4 frames."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny_text_to_image import tiny_t5_tokenizer

FRAMES = 5  # two frames of latents: the first one, and the next four


def save_tiny_wan(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration, of a solver on a flow's noise levels."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    keys: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **scheduler}
    WanPipeline(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**keys),
        vae=AutoencoderKLWan(**WAN_DECODER),
        text_encoder=_umt5(32),
        tokenizer=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


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


def _umt5(width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    keys: Any = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(**keys, feed_forward_proj="gated-gelu"))
