"""LoRA files with random numbers in the formats in circulation, for the small models of each family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TransitionIndex = tuple[Tensor, Tensor]
UNETS = ("stable_diffusion", "sdxl")
WITHOUT_TEXT = ("sana",)  # families whose text encoders diffusers adapts not
ALL = (*UNETS, "sd3", "flux", *WITHOUT_TEXT)
ENDS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")


def part_name(family: str) -> str:
    return "unet" if family in UNETS else "transformer"


def pairs(
    module: nn.Module, ends: tuple[str, ...] = ENDS, rank: Callable[[int], int] = lambda index: 4
) -> dict[str, TransitionIndex]:
    """Return both matrices of an adapter for each layer whose name has this ending. `rank` gets the layer's index."""
    generator, found = torch.Generator().manual_seed(5), {}
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for index, (name, layer) in enumerate((name, layer) for name, layer in layers if f".{name}".endswith(ends)):
        down = torch.randn(rank(index), layer.in_features, generator=generator) / 4
        found[name] = (down, torch.randn(layer.out_features, rank(index), generator=generator) / 4)
    return found


def peft_names(found: dict[str, TransitionIndex], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in found.items():
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    return tensors


def saved(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "lora.safetensors", header)
    return folder / "lora.safetensors"


def no_metadata(pipeline: Any, family: str, folder: Path) -> Path:
    part = part_name(family)
    return saved(peft_names(pairs(getattr(pipeline, part)), part), folder)


def mixed_ranks(pipeline: Any, family: str, folder: Path) -> Path:
    part = part_name(family)
    return saved(peft_names(pairs(getattr(pipeline, part), rank=lambda index: 2 + index % 3), part), folder)


def patterns(pipeline: Any, family: str, folder: Path) -> Path:
    """Return adapters of rank 4 and alpha 6 with exceptions for some layers, listed in the header."""
    part, network = part_name(family), getattr(pipeline, part_name(family))
    found = pairs(network, rank=lambda index: 2 if index % 3 == 0 else 4)
    others = [name for index, name in enumerate(found) if index % 3 == 0]
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": dict.fromkeys(others, 2),
        "alpha_pattern": dict.fromkeys(others, 7),
        "target_modules": list(found),
    }
    return saved(peft_names(found, part), folder, {f"{part}.{key}": value for key, value in settings.items()})


def dora(pipeline: Any, family: str, folder: Path) -> Path:
    """Return a DoRA as diffusers' training script saves it."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    part = part_name(family)
    network = type(getattr(pipeline, part)).from_config(getattr(pipeline, part).config)
    network.load_state_dict(getattr(pipeline, part).state_dict())
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["to_q", "to_out.0"])
    inject_adapter_in_model(config, network)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["to_q", "to_out.0"]}
    tensors = {f"{part}.{name}": value for name, value in get_peft_model_state_dict(network).items()}
    return saved(tensors, folder, {f"{part}.{key}": value for key, value in settings.items()})


def peft_folder(pipeline: Any, family: str, folder: Path) -> Path:
    """Write a folder as PEFT's `save_pretrained` does: rank-stabilized, with a rank pattern."""
    from peft import LoraConfig, get_peft_model

    part = part_name(family)
    network = type(getattr(pipeline, part)).from_config(getattr(pipeline, part).config)
    targets = ["to_q", "to_k", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"to_k": 3}, target_modules=targets)
    adapted = get_peft_model(network, config)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    adapted.save_pretrained(str(folder))
    return folder


def kohya_names(found: dict[str, TransitionIndex], prefix: str, alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in found.items():
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


def kohya(pipeline: Any, family: str, folder: Path) -> Path:
    """Return kohya's format with an alpha that differs from the rank, and with text encoders."""
    tensors = kohya_names(pairs(pipeline.unet), "lora_unet_", 3.0)
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    tensors |= kohya_names(_of_encoder(pipeline.text_encoder), f"{first}text_model_", 2.0)
    if family == "sdxl":
        tensors |= kohya_names(_of_encoder(pipeline.text_encoder_2), "lora_te2_text_model_", 2.0)
    return saved(tensors, folder)


def _of_encoder(encoder: nn.Module) -> dict[str, TransitionIndex]:
    found = pairs(encoder, ("q_proj", "v_proj", "out_proj", "fc1"))
    return {name.removeprefix("text_model."): pair for name, pair in found.items()}


def kohya_sgm(pipeline: Any, family: str, folder: Path) -> Path:
    """Return kohya's names of SDXL's original blocks: the second block on the way down."""
    found = pairs(pipeline.unet.down_blocks[1].attentions[0])
    return saved(kohya_names(found, "lora_unet_input_blocks_3_1_", 1.0), folder)


def kohya_double_blocks(pipeline: Any, family: str, folder: Path) -> Path:
    """Return kohya's names of FLUX's original blocks, in which one layer computes query, key and value."""
    block = pipeline.transformer.transformer_blocks[0].attn
    projection = pairs(block, (".to_out.0",))["to_out.0"]
    width, generator = block.to_q.in_features, torch.Generator().manual_seed(7)
    joined = tuple(
        torch.randn(shape, generator=generator) / 4 for shape in ((4, width), (3 * block.to_q.out_features, 4))
    )
    found = {"double_blocks.0.img_attn.proj": projection, "double_blocks.0.txt_attn.qkv": joined}
    tensors = kohya_names(found, "lora_unet_", 6.0)
    return saved(tensors | kohya_names(_of_encoder(pipeline.text_encoder), "lora_te1_text_model_", 2.0), folder)


def old_names(pipeline: Any, family: str, folder: Path) -> Path:
    """Return diffusers' names of 2023 (attention processors), with the text encoder's part."""
    tensors = {}
    for name, (down, up) in pairs(pipeline.unet, ("to_q", "to_v", "to_out.0")).items():
        block, _, layer = name.removesuffix(".0").rpartition(".")
        key = f"unet.{block}.processor.{layer}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    for name, (down, up) in _of_encoder(pipeline.text_encoder).items():
        key = f"text_encoder.text_model.{name}.lora_linear_layer"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return saved(tensors, folder)


def lora_down(pipeline: Any, family: str, folder: Path) -> Path:
    tensors = {}
    for name, (down, up) in pairs(pipeline.unet).items():
        tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    return saved(tensors, folder)


def with_text_encoders(pipeline: Any, family: str, folder: Path) -> Path:
    part = part_name(family)
    tensors = peft_names(pairs(getattr(pipeline, part)), part)
    for name in ("text_encoder", "text_encoder_2")[: 1 if family in ("stable_diffusion", "flux") else 2]:
        found = {f"text_model.{key}": pair for key, pair in _of_encoder(getattr(pipeline, name)).items()}
        tensors |= peft_names(found, name)
    return saved(tensors, folder)


FORMS: dict[str, tuple[Callable[[Any, str, Path], Path], tuple[str, ...]]] = {
    "no_metadata": (no_metadata, ALL),
    "mixed_ranks": (mixed_ranks, ALL),
    "patterns": (patterns, ALL),
    "dora": (dora, ALL),
    "peft": (peft_folder, ALL),
    "text_encoders": (with_text_encoders, tuple(name for name in ALL if name not in WITHOUT_TEXT)),
    "kohya": (kohya, UNETS),
    "kohya_sgm": (kohya_sgm, ("sdxl",)),
    "kohya_flux": (kohya_double_blocks, ("flux",)),
    "old_names": (old_names, UNETS),
    "lora_down": (lora_down, UNETS),
}
