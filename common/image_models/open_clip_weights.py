"""Load an open_clip checkpoint into transformers' CLIP, which has the same network under other names.

The conversion is our own: open_clip_torch converts only to its own names, and its network in place of transformers'
would change the bits of rewards and add torchvision and timm.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ddpo.common.image_models.weight_file import named_weights
from ray_ddpo.common.model_files.pretrained import loaded

State = dict[str, Tensor]

NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right, a linear layer from the left
IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
NOT_LEARNED = {"attn_mask"}  # older checkpoints carry the causal mask


def load_open_clip(path: str | Path, heads: int, dtype: torch.dtype) -> Any:
    """Load a CLIPModel from a `.pt` file of weights, or `.safetensors`, which give all sizes but `heads`.

    Raises:
        ValueError: The file is missing or unreadable, or does not hold the weights of an open_clip ViT.
    """
    from transformers import CLIPConfig, CLIPModel

    state = named_weights(path, "the checkpoint", ".pt")
    try:
        config, weights = CLIPConfig(**sizes(state, heads)), as_transformers(state)
    except KeyError as error:
        raise ValueError(f"the checkpoint {path} is no open_clip ViT with a text tower: {error.args[0]}") from None
    missing = f"the checkpoint {path} is no open_clip ViT with a text tower"
    return loaded(CLIPModel, None, missing, config=config, state_dict=weights, dtype=dtype)


def as_transformers(state: State) -> State:
    """Return the weights by transformers' names. Raise KeyError if a name is not one of open_clip's ViT."""
    weights: State = {}
    for name, tensor in state.items():
        if name in NAMES:
            weights[NAMES[name]] = tensor.T.contiguous() if name in TRANSPOSED else tensor
        elif name not in NOT_LEARNED:
            weights |= _of_a_block(name, tensor)
    return weights


def _of_a_block(name: str, tensor: Tensor) -> State:
    """Return one weight of a transformer block by transformers' names."""
    match = BLOCK.fullmatch(name)
    if not match:
        raise KeyError(f"it has {name!r}")
    tower, number, part, kind = match.groups()
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    if part == "attn.in_proj":
        # One matrix has queries, keys and values stacked.
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.clone() for letter, third in thirds}
    if part not in IN_A_BLOCK:
        raise KeyError(f"it has {name!r}")
    return {f"{prefix}.{IN_A_BLOCK[part]}.{kind}": tensor}


def sizes(state: State, heads: int) -> dict[str, Any]:
    """Return the keys of a CLIPConfig. Raise KeyError if a weight that determines a key is missing."""
    for name in ("visual.conv1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight", *NAMES):
        if name not in state:
            raise KeyError(f"it lacks {name!r}")
    patch = state["visual.conv1.weight"].shape[-1]
    patches = state["visual.positional_embedding"].shape[0] - 1  # one position is the class token's
    length = state["positional_embedding"].shape[0]
    words = state["token_embedding.weight"].shape[0]
    vision, text = (_tower(state, prefix, heads) for prefix in ("visual.transformer", "transformer"))
    return {
        "projection_dim": state["text_projection"].shape[1],
        "vision_config": {**vision, "patch_size": patch, "image_size": patch * math.isqrt(patches)},
        # CLIP's last two tokens begin and end a text.
        "text_config": {
            **text,
            "vocab_size": words,
            "max_position_embeddings": length,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
        },
    }


def _tower(state: State, prefix: str, heads: int) -> dict[str, Any]:
    """Return the configuration keys that both towers have."""
    blocks = {name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(f"{prefix}.resblocks.")}
    inner, width = state[f"{prefix}.resblocks.0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "hidden_act": "gelu",  # open_clip's own models have the exact GELU; OpenAI's have an approximation
    }
