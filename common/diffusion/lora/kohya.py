"""Write one of this program's LoRAs with the names of kohya's scripts, which many programs read.

In these names, FLUX's query, key and value are one layer.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_ddpo.common.diffusion.lora.adapters import module_of, scaled
from ray_ddpo.common.diffusion.lora.diffusers_format import NOT_READ
from ray_ddpo.common.diffusion.lora.files import LoraFile

ALPHA = ".alpha"
READERS = {"UNet2DConditionModel": "StableDiffusionLoraLoaderMixin", "FluxTransformer2DModel": "FluxLoraLoaderMixin"}


def save_kohya(file: LoraFile, path: Path) -> None:
    """Write the tensors of one of this program's files with kohya's names, so that they act at strength 1.

    With one rank, each layer's alpha is the rank. With several, no alpha is written: diffusers would apply the most
    frequent alpha to all layers, and without alphas every program uses each layer's own rank.

    Raises:
        ValueError: Another program wrote the file, or a layer has no such name.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    if not file.is_ours:
        raise ValueError(f"the LoRA {file.path} was not written by this program: only what it has trained is exported")
    kind = "UNet2DConditionModel" if file.part == "unet" else file.network
    if kind not in READERS:
        raise ValueError(
            f"the LoRA {file.path} is for {kind or 'a network that the file does not name'}: kohya's names are written "
            f"for {' and '.join(READERS)} only; diffusers and ComfyUI read the file as it is"
        )
    scales = {module: file.scale(module.removeprefix(f"{file.part}.")) for module in map(module_of, file.tensors)}
    wanted = scaled(file.tensors, scales)
    if file.part == "unet":
        renamed = convert_state_dict_to_kohya(wanted)
        tensors = {name: value.float().contiguous() for name, value in renamed.items()}  # alphas as kohya's scripts do
    else:
        tensors = flux_names(wanted)
    _refuse_what_is_read_otherwise(file, tensors, wanted, READERS[kind])
    alphas = {float(value) for name, value in tensors.items() if name.endswith(ALPHA)}
    if len(alphas) > 1:
        tensors = {name: value for name, value in tensors.items() if not name.endswith(ALPHA)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _refuse_what_is_read_otherwise(
    file: LoraFile, tensors: dict[str, Tensor], wanted: dict[str, Tensor], reader: str
) -> None:
    """Raise ValueError if diffusers does not read the same weights back from kohya's names."""
    from diffusers.loaders import lora_pipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    loader: Any = getattr(lora_pipeline, reader)
    try:
        state = loader.lora_state_dict(dict(tensors))
        back = convert_unet_state_dict_to_peft(state[0] if isinstance(state, tuple) else state)
    except NOT_READ as error:
        raise ValueError(
            f"the LoRA {file.path} has layers without names of kohya's that diffusers reads "
            f"({type(error).__name__}: {str(error)[:200]}); diffusers reads the file as it is"
        ) from error
    lost = [name for name in wanted if name not in back or not torch.equal(back[name], wanted[name])]
    if lost:
        raise ValueError(
            f"the LoRA {file.path} has layers without a name of kohya's, {len(lost)} of {len(wanted)} tensors, such as "
            f"{lost[0]}: diffusers reads the file as it is"
        )


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
    return {
        f"{name}.lora_down.weight": down.contiguous(),
        f"{name}.lora_up.weight": up.contiguous(),
        f"{name}.alpha": torch.tensor(float(len(down))),
    }
