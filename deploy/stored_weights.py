"""Read trained weights out of the files that diffusers loads, back under the names that they have in the network."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from common.diffusion.lora import lora_file
from common.diffusion.weight_files import network_folder, part_of
from common.lora_weights import LoraWeights, Manifest, pack
from common.reading import reading


def stored_weights(path: Path, manifest: Manifest, policy_version: int) -> LoraWeights:
    """Return what a run's files hold, in the order of `manifest`. ValueError: a parameter is not there."""
    network = network_folder(path)
    if network:
        arrays = {name: array for file in network.glob("*.safetensors") for name, array in _arrays(file).items()}
        names = {name: name for name, _ in manifest}
    else:
        arrays = _arrays(lora_file(path))
        # In the network an adapter has a name, in diffusers' files it has none.
        part = part_of(next(iter(arrays), ""))
        names = {name: f"{part}.{name.replace('.default.', '.')}" for name, _ in manifest}
    lacking = sorted(set(names.values()) - arrays.keys())
    if lacking:
        raise ValueError(f"the weights in {path} lack {lacking[:3]}: they are not those of this run")
    return pack(policy_version, {name: arrays[stored] for name, stored in names.items()})


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with reading(file):
        return load_file(file)
