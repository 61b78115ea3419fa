"""Read a file of weights, .safetensors or torch.save's, without unpickling anything but tensors and plain containers."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_weight_file(path: str | Path, what: str, torch_suffix: str = ".pth") -> Any:
    """What the file holds, on the CPU. ValueError, naming it as `what`: it is not there, or it can't be read safely."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{what} {path} is not there: give the path of its weights, .safetensors or {torch_suffix}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{what} {path} cannot be read: it must be a .safetensors file, or a {torch_suffix} file of weights only"
        ) from error


def named_weights(path: str | Path, what: str, torch_suffix: str = ".pth") -> dict[str, torch.Tensor]:
    """The same, of a file of named weights, also where a checkpoint has them under "state_dict"."""
    held = read_weight_file(path, what, torch_suffix)
    state = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{what} {path} holds {type(state).__name__}: it must hold named weights")
    return state
