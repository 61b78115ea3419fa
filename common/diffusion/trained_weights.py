"""Trained weights in files, as adapters or a full network, in diffusers' own format. Nothing is pickled."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_ddpo.common.diffusion.lora.adapters import LoraSettings, load_lora, save_lora, trained_tensors
from ray_ddpo.common.diffusion.lora.files import read_lora_file
from ray_ddpo.common.model_files.file_faults import refuse_not_finite
from ray_ddpo.common.model_files.pretrained import weights_fault
from ray_ddpo.common.model_files.weight_files import TRAINED_PARTS, network_folder, stored_name
from ray_ddpo.common.policy_weights import Manifest, PolicyWeights, pack
from ray_ddpo.common.reading import reading
from ray_ddpo.common.run_storage.reading import read_json
from ray_ddpo.common.run_storage.storage import Storage

CONFIG_NAME = "config.json"
SHOWN = 3  # configuration keys in a message
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # as diffusers calls a network's file


def save_trained(network: Any, train: str, lora: LoraSettings, folder: Path, part: str) -> Path:
    """Write the trained weights into a run's folder. Return the path that diffusers loads.

    If the network is not diffusers' `ModelMixin`, its state dict goes into one safetensors file. `part` is the
    network's name in its pipeline.
    """
    if part not in TRAINED_PARTS:
        raise ValueError(f"save_trained was given the part {part!r}: it must be one of {list(TRAINED_PARTS)}")
    if train == "lora":
        return save_lora(network, lora, folder / "lora", part)
    if _is_of_diffusers(network):
        network.save_pretrained(folder / part, safe_serialization=True)
    else:
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(_state(network), folder / part / WEIGHTS_NAME)
    return folder / part


def restore_trained(network: Any, train: str, path: Path) -> None:
    """Read what `save_trained` wrote, or weights in the same format.

    Raises:
        ValueError: The weights do not fit the network, or are not finite.
    """
    if train == "lora":
        return load_lora(network, path)
    for file in sorted(path.glob("*.safetensors")):
        with reading(file):
            refuse_not_finite(file, load_file(file))
    if _is_of_diffusers(network):
        return _load_network(network, path)
    return _load_state(network, path / WEIGHTS_NAME)


def stored_weights(path: Path, manifest: Manifest, policy_version: int) -> PolicyWeights:
    """Return the weights in a run's folder, under the parameters' names in the network.

    Raises:
        ValueError: There are no such files, they lack a parameter, or a weight is not finite.
    """
    network = network_folder(path)
    if network:
        arrays: dict[str, np.ndarray] = {}
        for stored in network.glob("*.safetensors"):
            with reading(stored):
                found = load_arrays(stored)
                refuse_not_finite(stored, found)
            arrays |= found
        names = {name: name for name, _ in manifest}
    else:
        file = read_lora_file(path)
        arrays = {name: value.float().numpy() for name, value in trained_tensors(file).items()}
        # PEFT's names in the network contain the adapter's name, diffusers' files do not.
        part = file.part
        names = {name: stored_name(part, re.sub(r"[.]default(?=[.]|$)", "", name)) for name, _ in manifest}
    lacking = sorted(set(names.values()) - arrays.keys())
    if lacking:
        raise ValueError(f"the weights in {path} lack {lacking[:3]}: they are not those of this run")
    return pack(policy_version, {name: arrays[stored] for name, stored in names.items()})


def _is_of_diffusers(network: Any) -> bool:
    from diffusers.models.modeling_utils import ModelMixin

    return isinstance(network, ModelMixin)


def _load_network(network: Any, path: Path) -> None:
    """Load a diffusers network from its folder. Raise ValueError if the folder holds another, or lacks a weight."""
    name, misfit = type(network).__name__, f"the weights in {path} do not fit {type(network).__name__}"
    config = read_json(Storage(path), CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {}
    if config.get("_class_name", name) != name:
        raise ValueError(f"{misfit}: their {CONFIG_NAME} is that of {config['_class_name']}")
    with reading(path):
        keys = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        stored, found = type(network).from_pretrained(path, local_files_only=True, use_safetensors=True, **keys)
    if fault := weights_fault(found, refuse_unexpected=True):
        raise ValueError(f"{misfit} ({fault})")
    own, given = (json.loads(each.to_json_string()) for each in (network, stored))
    differing = [key for key in own if not key.startswith("_") and key != "sample_size" and own[key] != given.get(key)]
    if differing:
        said = ", ".join(f"{key}={given.get(key)!r} and the model {own[key]!r}" for key in differing[:SHOWN])
        raise ValueError(f"{misfit}: their {CONFIG_NAME} has {said}")
    network.load_state_dict(stored.state_dict())


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers. A tensor with several names appears under the first, as in `named_parameters`."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            first.setdefault(id(value), (name, value))
    return {name: value.detach().cpu().clone().contiguous() for name, value in first.values()}


def _load_state(network: nn.Module, file: Path) -> None:
    """Load every tensor of the network from a file of `_state`. Raise ValueError if that is missing or does not fit."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}: it holds no trained network")
    with reading(file):
        given = load_file(file)
    wanted = _state(network)
    wanted_shapes, shapes = ({name: value.shape for name, value in each.items()} for each in (wanted, given))
    if differing := sorted({name for name, _ in wanted_shapes.items() ^ shapes.items()}):
        raise ValueError(f"the weights {file} do not fit {type(network).__name__} at {differing[:3]}: another network")
    network.load_state_dict(given, strict=False)
