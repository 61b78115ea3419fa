"""Small FLUX.2 pipelines with random weights, of diffusers' own classes and in their format."""

from pathlib import Path
from typing import Any

import torch

from tests.tiny_decoders import AUTOENCODER
from tests.tiny_language_models import tiny_chat_tokenizer, tiny_mistral3, tiny_mistral_tokenizer, tiny_qwen3

FLUX2_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
FLUX2_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


def save_tiny_flux2(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline of dev with a tokenizer in place of a processor. `scheduler` changes its configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    torch.manual_seed(seed)
    keys: Any = FLUX2_SCHEDULER | scheduler
    tokenizer = tiny_mistral_tokenizer()
    Flux2Pipeline(
        transformer=Flux2Transformer2DModel(**FLUX2_TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=_flux2_decoder(),
        text_encoder=tiny_mistral3(16, len(tokenizer)),
        tokenizer=tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux2_klein(folder: Path, seed: int = 0, is_distilled: bool = False, **scheduler: object) -> Path:
    """Write the pipeline of the base, or of the distilled model. `scheduler` changes its configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(seed)
    keys: Any = FLUX2_SCHEDULER | scheduler
    tokenizer = tiny_chat_tokenizer(5)
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**FLUX2_TRANSFORMER, guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=_flux2_decoder(),
        text_encoder=tiny_qwen3(16, len(tokenizer), layers=28, with_head=True),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def _flux2_decoder() -> Any:
    """Return a decoder whose batch norm has statistics of its own."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(**AUTOENCODER, latent_channels=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae
