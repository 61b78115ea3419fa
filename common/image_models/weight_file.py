"""Read weights from .safetensors or torch.save files. Only tensors and plain containers are unpickled."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_weight_file(path: str | Path, what: str, torch_suffix: str = ".pth") -> Any:
    """Return the file's contents, on the CPU.

    Raises:
        ValueError: The file, called `what` in the message, is missing or cannot be read safely.
    """
    path = Path(os.path.expanduser(path))
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
    """Return a file's named weights, also those under "state_dict". Raise ValueError if the file has something else."""
    held = read_weight_file(path, what, torch_suffix)
    state = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{what} {path} holds {type(state).__name__}: it must hold named weights")
    return state
