"""Save and load the training state of the embedded model, so that training can resume: safetensors and JSON only."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass
class TrainingProgress:
    """The progress of training."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, over all starts
    losses: list[float] = field(default_factory=list)  # mean squared error of the noise, one mean for each 50 steps


def save_training(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: TrainingProgress
) -> None:
    """Save modules, optimizer state and progress, and replace the older state atomically."""
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    writing = folder / "training.writing"
    metadata = {"progress": json.dumps(asdict(progress))}
    save_file({key: value.contiguous() for key, value in tensors.items()}, writing, metadata)
    os.replace(writing, folder / "training.safetensors")
    (folder / "progress.json").write_text(metadata["progress"])


def load_training(folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Load the state that `save_training` saved into modules and optimizer, and return the progress.

    Raises:
        FileNotFoundError: nothing was saved in `folder`.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "training.safetensors").items():
        name, _, rest = key.partition("/")
        groups.setdefault(name, {})[rest] = value
    for name, module in modules.items():
        module.load_state_dict(groups[name])
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in groups["optimizer"].items():
        index, _, name = key.partition("/")
        if value.dim() == 4:
            # The fused optimizer reads memory in order: its state must have the parameter's memory format.
            value = torch.empty_like(parameters[int(index)]).copy_(value)
        state["state"].setdefault(int(index), {})[name] = value.detach()
    optimizer.load_state_dict(state)
    return TrainingProgress(**json.loads((folder / "progress.json").read_text()))
