"""Write one of this program's LoRAs with the names of kohya's scripts, which many programs read."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_ddpo.common.diffusion.lora.adapters import module_of
from ray_ddpo.common.diffusion.lora.diffusers_format import NOT_READ
from ray_ddpo.common.diffusion.lora.files import LoraFile
from ray_ddpo.common.diffusion.lora.kohya_flux import flux_names

ALPHA = ".alpha"
READERS = {"UNet2DConditionModel": "StableDiffusionLoraLoaderMixin", "FluxTransformer2DModel": "FluxLoraLoaderMixin"}


def save_kohya(file: LoraFile, path: Path) -> None:
    """Write the tensors of one of this program's files with kohya's names, so that they act at strength 1.

    With one rank, each layer's alpha is the rank. With several, no alpha is written: diffusers would apply the most
    frequent
    alpha to all layers, and without alphas every program uses each layer's own rank.

    Raises:
        ValueError: Another program wrote the file, or a layer has no such name.
    """
    if not file.is_ours:
        raise ValueError(f"the LoRA {file.path} was not written by this program: only what it has trained is exported")
    kind = "UNet2DConditionModel" if file.part == "unet" else file.network
    if kind not in READERS:
        raise ValueError(
            f"the LoRA {file.path} is for {kind or 'a network that the file does not name'}: kohya's names are written for "
            f"{' and '.join(READERS)} only; diffusers and ComfyUI read the file as it is"
        )
    wanted = _at_full_strength(file)
    tensors = _of_unet(wanted) if file.part == "unet" else flux_names(wanted)
    _refuse_what_is_read_otherwise(file, tensors, wanted, READERS[kind])
    alphas = {float(value) for name, value in tensors.items() if name.endswith(ALPHA)}
    if len(alphas) > 1:
        tensors = {name: value for name, value in tensors.items() if not name.endswith(ALPHA)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _of_unet(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    renamed = convert_state_dict_to_kohya(wanted)
    return {name: value.float().contiguous() for name, value in renamed.items()}  # alphas as kohya's scripts write them


def _at_full_strength(file: LoraFile) -> dict[str, Tensor]:
    """Return the tensors with the header's factor multiplied in."""
    scales = {module: file.scale(module.removeprefix(f"{file.part}.")) for module in map(module_of, file.tensors)}
    return {
        name: value * scales[module_of(name)] if ".lora_B" in name else value for name, value in file.tensors.items()
    }


def _refuse_what_is_read_otherwise(
    file: LoraFile, tensors: dict[str, Tensor], wanted: dict[str, Tensor], reader: str
) -> None:
    """Raise ValueError if diffusers does not read the same weights back.

    Kohya's names have underscores instead of dots.
    """
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
