"""Save a Stable Diffusion with a published architecture and random weights in diffusers' format, for benchmarks."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ray_ddpo.common.diffusion.families.stable_diffusion import SD1, StableDiffusion
from ray_ddpo.common.diffusion.loading.model_sizes import meta_parts
from ray_ddpo.common.diffusion.policy import quiet_libraries
from tests.tiny_pipeline import tiny_tokenizer

Scale = Literal["sd15", "tiny"]
# The same kinds of blocks as SD 1.5's, some thousand times smaller, for images of 16 × 16 pixels.
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "cross_attention_dim": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    },
    "text_encoder": {
        "vocab_size": 520,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": 16,
    },
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_random_pipeline(folder: Path, scale: Scale = "sd15", dtype: torch.dtype = torch.float16) -> Path:
    """Save the pipeline. SD 1.5's shapes take 2 GB in half precision. Equal calls give equal weights."""
    quiet_libraries()
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    configs = SD1 if scale == "sd15" else TINY
    text = {**configs["text_encoder"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    parts = meta_parts(StableDiffusion(model=str(folder)), {**configs, "text_encoder": text})
    for seed, part in enumerate(parts.values()):
        fill(part.to(dtype).to_empty(device="cpu"), seed)
    StableDiffusionPipeline(
        **parts,
        tokenizer=tiny_tokenizer(text["max_position_embeddings"]),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def fill(part: nn.Module, seed: int) -> None:
    """Fill a module with random weights of gain 1, so that half precision does not overflow.

    Each parameter has its own generator, so that threads do not change the result.
    """

    @torch.no_grad()  # here, because grad mode is per thread
    def filled(numbered: tuple[int, tuple[str, nn.Parameter]]) -> None:
        index, (name, parameter) = numbered
        if parameter.ndim == 1:  # biases, and the scales of norms
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            return
        generator = torch.Generator().manual_seed(1_000_000 * seed + index)
        deviation = 0.02 if "embedding" in name else 1 / math.sqrt(parameter[0].numel())
        parameter.normal_(0, deviation, generator=generator)

    with ThreadPoolExecutor() as threads:
        list(threads.map(filled, enumerate(part.named_parameters())))
