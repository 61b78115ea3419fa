"""Load BLIP's published weights into transformers' models, which have the same network under other names."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from ray_ddpo.common.model_files.pretrained import loaded

State = dict[str, Tensor]

HEAD_WIDTH = 64  # of an attention head, in both towers of every BLIP
IMAGE_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
IN_A_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
IMAGES, TEXTS = "visual_encoder.", "text_encoder."


def load_blip(state: State, dtype: torch.dtype, missing: str) -> tuple[Any, Any]:
    """Load the image tower, and the text tower with cross-attention to images. Their sizes come from the weights.

    Raises:
        ValueError: `missing`, and which weight is missing or unknown.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    images, texts = (without_prefix(state, prefix) for prefix in (IMAGES, TEXTS))
    texts.pop("embeddings.position_ids", None)  # constant, not learned
    try:
        image_config, text_config = BlipVisionConfig(**image_sizes(images)), BlipTextConfig(**text_sizes(texts))
        weights = image_weights(images)
    except KeyError as error:
        raise ValueError(f"{missing} ({error.args[0]})") from None
    image_tower = loaded(BlipVisionModel, None, missing, config=image_config, state_dict=weights, dtype=dtype)
    options = {"config": text_config, "state_dict": texts, "dtype": dtype, "add_pooling_layer": False}
    return image_tower, loaded(BlipTextModel, None, missing, **options)


def without_prefix(state: State, prefix: str) -> State:
    """Return the weights whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def image_weights(state: State) -> State:
    """Return the image tower's weights by transformers' names. Raise KeyError if a name is not BLIP's."""
    weights: State = {}
    for name, tensor in state.items():
        match = BLOCK.fullmatch(name)
        if name in IMAGE_NAMES:
            weights[IMAGE_NAMES[name]] = tensor
        elif match and match[2] in IN_A_BLOCK:
            weights[f"encoder.layers.{match[1]}.{IN_A_BLOCK[match[2]]}.{match[3]}"] = tensor
        else:
            raise KeyError(f"it has {IMAGES}{name}")
    return weights


def image_sizes(state: State) -> dict[str, Any]:
    """Return the keys of a BlipVisionConfig. Raise KeyError if a weight that determines a key is missing."""
    width, _, patch, _ = _shape(state, IMAGES, "patch_embed.proj.weight")
    patches = _shape(state, IMAGES, "pos_embed")[1] - 1  # one position is the class token's
    return {
        "hidden_size": width,
        "intermediate_size": _shape(state, IMAGES, "blocks.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(state, r"blocks\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "patch_size": patch,
        "image_size": patch * math.isqrt(patches),
        "layer_norm_eps": 1e-6,  # BLIP's own; transformers' default differs
    }


def text_sizes(state: State) -> dict[str, Any]:
    """Return the keys of a BlipTextConfig. Raise KeyError if a weight that determines a key is missing."""
    words, width = _shape(state, TEXTS, "embeddings.word_embeddings.weight")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "encoder_hidden_size": _shape(state, TEXTS, "encoder.layer.0.crossattention.self.key.weight")[1],
        "intermediate_size": _shape(state, TEXTS, "encoder.layer.0.intermediate.dense.weight")[0],
        "num_hidden_layers": _count(state, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": _shape(state, TEXTS, "embeddings.position_embeddings.weight")[0],
        "is_decoder": True,  # adds the cross-attention; the tower is not run as a decoder
        "bos_token_id": None,  # used in generation only
        "sep_token_id": None,
        "eos_token_id": None,
    }


def _shape(state: State, prefix: str, name: str) -> torch.Size:
    if name not in state:
        raise KeyError(f"it lacks {prefix}{name}")
    return state[name].shape


def _count(state: State, pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})
