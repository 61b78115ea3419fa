"""A small CLIP with random weights, and a head for it, in the formats that the aesthetic reward reads."""

from pathlib import Path

import torch
from safetensors.torch import save_file

EMBEDDING = 16
SIDE = 32


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write a whole CLIP, image and text tower, as the hub has it."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": SIDE, "patch_size": 8, "projection_dim": EMBEDDING}
    text = {
        **small,
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "projection_dim": EMBEDDING,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))
    # Weights of the usual 0.02 would give nearly one embedding for all pictures.
    for parameter in model.vision_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_tiny_head(path: Path, dimension: int = EMBEDDING, seed: int = 0) -> Path:
    """Write a head of one layer."""
    generator = torch.Generator().manual_seed(seed)
    save_file({"weight": torch.randn(1, dimension, generator=generator), "bias": torch.tensor([5.0])}, path)
    return path
