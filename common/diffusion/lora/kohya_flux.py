"""FLUX's layer names in kohya's scripts, where one layer computes query, key and value."""

import re

import torch
from torch import Tensor

BLOCK = re.compile(r"transformer\.(?:(single)_)?transformer_blocks\.(\d+)\.(.+)")
# Kind of block → kohya's layer → diffusers' layers that it joins, each with its width relative to the first.
JOINED = {
    "": {
        "img_attn_qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
        "txt_attn_qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    },
    "single": {"linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}},
}
ALONE = {
    "": {
        "attn.to_out.0": "img_attn_proj",
        "attn.to_add_out": "txt_attn_proj",
        "ff.net.0.proj": "img_mlp_0",
        "ff.net.2": "img_mlp_2",
        "ff_context.net.0.proj": "txt_mlp_0",
        "ff_context.net.2": "txt_mlp_2",
        "norm1.linear": "img_mod_lin",
        "norm1_context.linear": "txt_mod_lin",
    },
    "single": {"proj_out": "linear2", "norm.linear": "modulation_lin"},
}
Adapter = tuple[Tensor, Tensor]  # down and up


def flux_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's tensors by kohya's names instead of diffusers'. Layers without such a name are left out."""
    downs = {name.removesuffix(".lora_A.weight"): value for name, value in tensors.items() if "lora_A" in name}
    blocks: dict[tuple[str, str], dict[str, Adapter]] = {}
    for module, down in downs.items():
        if found := BLOCK.fullmatch(module):
            kind, number, layer = found[1] or "", found[2], found[3]
            blocks.setdefault((kind, number), {})[layer] = (down, tensors[f"{module}.lora_B.weight"])
    named: dict[str, Tensor] = {}
    for (kind, number), layers in blocks.items():
        prefix = f"lora_unet_{kind or 'double'}_blocks_{number}_"
        for layer, (down, up) in layers.items():
            if layer in ALONE[kind]:
                named |= _with_alpha(prefix + ALONE[kind][layer], down, up)
        for name, parts in JOINED[kind].items():
            if any(part in layers for part in parts):
                named |= _with_alpha(prefix + name, *_as_one(layers, parts))
    return named


def _as_one(layers: dict[str, Adapter], parts: dict[str, int]) -> Adapter:
    """Return the adapter of a joined layer. It is block-diagonal: each original adapter acts on its own rows only."""
    given = [layers[part] for part in parts if part in layers]
    rank = max(down.shape[0] for down, _ in given)
    part = next(part for part in parts if part in layers)
    width = layers[part][1].shape[0] // parts[part]
    down = torch.zeros(rank * len(parts), given[0][0].shape[1])
    up = torch.zeros(width * sum(parts.values()), rank * len(parts))
    row = 0
    for index, (part, times) in enumerate(parts.items()):
        if part in layers:
            part_down, part_up = layers[part]
            columns = slice(index * rank, index * rank + len(part_down))
            down[columns] = part_down
            up[row : row + width * times, columns] = part_up
        row += width * times
    return down, up


def _with_alpha(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    alpha = torch.tensor(float(down.shape[0]))
    return {
        f"{name}.lora_down.weight": down.contiguous(),
        f"{name}.lora_up.weight": up.contiguous(),
        f"{name}.alpha": alpha,
    }
