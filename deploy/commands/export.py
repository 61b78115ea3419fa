"""ddpo export: write a run's LoRA in the format of other programs."""

from pathlib import Path

from ray_ddpo.common.diffusion.lora.files import FILE_NAME, read_lora_file
from ray_ddpo.common.diffusion.lora.kohya import save_kohya
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.run_storage.run_folder import weights_here


def export(weights: str, output: str) -> str:
    """Write a LoRA of this program in kohya's format; return a line for the terminal.

    Args:
        weights: a run's folder, its best/, or a LoRA's file or folder.
        output: the file to write.

    Raises:
        ValueError: there is no LoRA of this program, its layers have no names in that format, or the file exists.
    """
    path = Path(output)
    if path.suffix != ".safetensors" or path.exists():
        raise ValueError(f"the output is {output!r}: it must be a .safetensors file that is not there yet")
    with weights_here(weights) as here:
        if network_folder(here) is not None:
            raise ValueError(f"{weights} is a full network: it has no LoRA to export")
        folded = next((file for file in (here / "lora" / FILE_NAME, here / FILE_NAME) if file.is_file()), here)
        save_kohya(read_lora_file(folded), path)
    return f"{path}: kohya's names, to be read at strength 1"
