"""Small pipelines of the model families with random weights, of diffusers' own classes and in their format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny_pipeline import save_tiny_pipeline, tiny_tokenizer

DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
AUTOENCODER = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
EIGHTFOLD = AUTOENCODER | {  # 8 × 8 pixels of a latent, which SDXL is told of
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
FLOW_AUTOENCODER = AUTOENCODER | {
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


def save_tiny_sdxl(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes the published configuration."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    config: Any = DDIM | {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", **scheduler}
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**EIGHTFOLD, scaling_factor=0.13),
        text_encoder=_clip(16, with_projection=False),
        text_encoder_2=_clip(24, with_projection=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(config),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_sd3(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    keys: Any = {"shift": 3.0, **scheduler}
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**FLOW_AUTOENCODER),
        text_encoder=_clip(16, with_projection=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_clip(24, with_projection=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=_t5(48),
        tokenizer_3=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_flux(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration, which shifts noise levels with the image's size."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    keys: Any = {"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**keys),
        vae=AutoencoderKL(**FLOW_AUTOENCODER),
        text_encoder=_clip(16, with_projection=False),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(32),
        tokenizer_2=tiny_t5_tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_digits(folder: Path, seed: int = 0) -> Path:
    """Write the network of docs/digits."""
    from digit_transformer import DigitTransformer

    torch.manual_seed(seed)
    DigitTransformer(size=8, patch=2, width=16, num_heads=2, num_blocks=2).save_pretrained(
        folder, safe_serialization=True
    )
    return folder


def save_tiny_shapes(folder: Path, seed: int = 0) -> Path:
    """Write the weights of docs/shapes."""
    from shape_network import ShapeNetwork

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(ShapeNetwork().state_dict(), folder / "shapes.pt")
    return folder / "shapes.pt"


def tiny_t5_tokenizer(max_length: int = 12) -> Any:
    """Return a tokenizer whose tokens are letters."""
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=max_length)


def _clip(width: int, with_projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    "stable_diffusion": save_tiny_pipeline,
    "sdxl": save_tiny_sdxl,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
}
FROM_OUTSIDE: dict[str, Callable[[Path], Path]] = {  # as docs/extending.md has them
    "digits:Digits": save_tiny_digits,
    "shapes:Shapes": save_tiny_shapes,
}
PROMPTS = {"digits:Digits": ["seven", "3", "a two"], "shapes:Shapes": ["disc", "ring", "cross"]}
KEYS: dict[str, dict[str, Any]] = {  # of `[policy]`, that such a small model needs
    "sd3": {"max_sequence_length": 12},
    "flux": {"max_sequence_length": 12, "resolution": 16},
}


def policy_table(name: str, model: Path, **keys: Any) -> dict[str, Any]:
    """Return the recipe's `[policy]` for a family's small model."""
    return {"name": name, "model": str(model), **KEYS.get(name, {}), **keys}
