"""Write a LoRA of ours by the names of kohya's scripts, which ComfyUI, AUTOMATIC1111 and Forge read for UNets."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.diffusion.lora import module_of
from common.diffusion.lora_file import LoraFile
from common.diffusion.weight_files import TRAINED_PARTS

UNET, _ = TRAINED_PARTS


def save_kohya(file: LoraFile, path: Path) -> None:
    """Write the tensors of one of our files by kohya's names, each with an alpha that says how strongly it acts.

    Raises:
        ValueError: the file is none of ours, or there are no such names for a layer.
    """
    if not file.is_ours:
        raise ValueError(f"the LoRA {file.path} was not written by this program: only what it has trained is exported")
    if file.part != UNET:
        raise ValueError(
            f"the LoRA {file.path} is a transformer's: diffusers and ComfyUI read it as it is, by the names of its layers; "
            "kohya's names are written for the UNets of Stable Diffusion and SDXL alone"
        )
    tensors = _kohya(file)
    _refuse_what_diffusers_reads_otherwise(file, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _kohya(file: LoraFile) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    renamed = convert_state_dict_to_kohya(_at_full_strength(file))
    return {name: value.float().contiguous() for name, value in renamed.items()}  # an alpha as kohya's scripts write it


def _at_full_strength(file: LoraFile) -> dict[str, Tensor]:
    """Return the tensors with what the header multiplies them by in them."""
    scales = {module: file.scale(module.removeprefix(f"{file.part}.")) for module in map(module_of, file.tensors)}
    return {
        name: value * scales[module_of(name)] if ".lora_B" in name else value for name, value in file.tensors.items()
    }


def _refuse_what_diffusers_reads_otherwise(file: LoraFile, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a layer's name cannot be told from kohya's, in which dots and underscores are one."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(tensors))[0]
    back, wanted = convert_unet_state_dict_to_peft(state), _at_full_strength(file)
    lost = [name for name in wanted if name not in back or not torch.equal(back[name], wanted[name])]
    if lost:
        raise ValueError(
            f"the LoRA {file.path} has layers without a name of kohya's, {len(lost)} of {len(wanted)} tensors, such as "
            f"{lost[0]}: diffusers reads it as it is"
        )
