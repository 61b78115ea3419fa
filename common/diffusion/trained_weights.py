"""Trained weights in files: adapters, or a whole network, in diffusers' own format."""

from pathlib import Path
from typing import Any

from common.diffusion.lora import LoraSettings, load_lora, save_lora
from common.reading import reading


def save_trained(network: Any, train: str, lora: LoraSettings, folder: Path, part: str) -> Path:
    """Write them into a run's folder; the path that diffusers loads. `part`: what the network is called in its pipeline."""
    if train == "lora":
        return save_lora(network, lora, folder / "lora", part)
    network.save_pretrained(folder / part, safe_serialization=True)
    return folder / part


def restore_trained(network: Any, train: str, path: Path) -> None:
    """Read what `save_trained` wrote, or any of the same form. ValueError: it is a LoRA that does not fit the network."""
    if train == "lora":
        return load_lora(network, path)
    with reading(path):
        whole = type(network).from_pretrained(path, use_safetensors=True)
    network.load_state_dict(whole.state_dict())
