"""Reference implementation of BLIP with cross-attention, on weights with the names of its code (Li et al. 2022)."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

from ray_ddpo.common.image_models.blip_weights import State, without_prefix


def linear(state: State, name: str, values: Tensor) -> Tensor:
    return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, values: Tensor, epsilon: float) -> Tensor:
    return layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def attention(queries: Tensor, keys: Tensor, values: Tensor, may_look: Tensor | None = None) -> Tensor:
    """Apply attention with heads of 64 numbers. [B, L, D]"""
    parts = [tensor.unflatten(-1, (-1, 64)).transpose(1, 2) for tensor in (queries, keys, values)]
    scores = parts[0] @ parts[1].transpose(2, 3) / 8
    if may_look is not None:
        scores = scores.masked_fill(~may_look[:, None, None, :].bool(), -torch.inf)
    return (scores.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)


def slow_images(state: State, pixels: Tensor) -> Tensor:
    kernel, bias = (state[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    patches = conv2d(pixels, kernel, bias, stride=8).flatten(2).transpose(1, 2)
    values = torch.cat([state["cls_token"].expand(len(patches), -1, -1), patches], dim=1) + state["pos_embed"]
    for number in range(2):
        block = f"blocks.{number}"
        parts = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", values, 1e-6)).chunk(3, dim=-1)
        values = values + linear(state, f"{block}.attn.proj", attention(*parts))
        inner = gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", values, 1e-6)))
        values = values + linear(state, f"{block}.mlp.fc2", inner)
    return norm(state, "norm", values, 1e-6)


def slow_texts(state: State, numbers: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    places = state["embeddings.position_embeddings.weight"][: numbers.shape[1]]
    values = norm(state, "embeddings.LayerNorm", state["embeddings.word_embeddings.weight"][numbers] + places, 1e-12)
    for number in range(2):
        layer = f"encoder.layer.{number}"
        for kind, source, may_look in (("attention", None, mask), ("crossattention", seen, None)):
            asked = linear(state, f"{layer}.{kind}.self.query", values)
            source = values if source is None else source
            found = [linear(state, f"{layer}.{kind}.self.{part}", source) for part in ("key", "value")]
            mixed = linear(state, f"{layer}.{kind}.output.dense", attention(asked, *found, may_look))
            values = norm(state, f"{layer}.{kind}.output.LayerNorm", values + mixed, 1e-12)
        inner = linear(state, f"{layer}.output.dense", gelu(linear(state, f"{layer}.intermediate.dense", values)))
        values = norm(state, f"{layer}.output.LayerNorm", values + inner, 1e-12)
    return values


def slow_blip(state: State, pixels: Tensor, numbers: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of image tower and text tower. [B, P, D], [B, L, D2]"""
    blip = without_prefix(state, "blip.")
    seen = slow_images(without_prefix(blip, "visual_encoder."), pixels)
    return seen, slow_texts(without_prefix(blip, "text_encoder."), numbers, mask, seen)
