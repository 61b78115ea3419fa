"""Small pipelines of Qwen-Image and Qwen-Image-Edit with random weights, of diffusers' own classes and in their format."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny_language_models import (
    QWEN_EDIT_TEMPLATE,
    QWEN_IMAGE_TEMPLATE,
    VISION_MARKS,
    tiny_qwen_tokenizer,
    tiny_qwen_vl,
)


def save_tiny_qwen_image(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline. `scheduler` changes its configuration, which ends above noise level 0."""
    from diffusers import QwenImagePipeline

    tokenizer = tiny_qwen_tokenizer(QWEN_IMAGE_TEMPLATE, 34)
    QwenImagePipeline(**_parts(tokenizer, seed, scheduler)).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_qwen_image_edit(
    folder: Path, seed: int = 0, pipeline: str = "QwenImageEditPipeline", **scheduler: object
) -> Path:
    """Write the pipeline. Its processor is written apart, because only one with torchvision can be loaded."""
    import diffusers
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = tiny_qwen_tokenizer(QWEN_EDIT_TEMPLATE, 64, VISION_MARKS)
    parts = _parts(tokenizer, seed, scheduler) | {"processor": None}
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder, safe_serialization=True)
    for part in (tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_tiny_qwen_image_edit_plus(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """Write the pipeline of later versions, whose parts are those of the first one."""
    return save_tiny_qwen_image_edit(folder, seed, "QwenImageEditPlusPipeline", **scheduler)


def _parts(tokenizer: Any, seed: int, scheduler: dict[str, object]) -> dict[str, Any]:
    """Return what all pipelines have."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    torch.manual_seed(seed)
    transformer: Any = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():  # a text changes images clearly, although image tokens stand beside it
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(8)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    keys: Any = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        **scheduler,
    }
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**keys),
        "vae": vae,
        "text_encoder": tiny_qwen_vl(32, tokenizer),
        "tokenizer": tokenizer,
    }
