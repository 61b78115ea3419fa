"""The optimizer that a recipe names, what its state takes, and that state as arrays for a checkpoint."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.recipe.tables import LearnerTable

ADAM_STATE_BYTES = 8  # bytes a trained number: two moments in float32
SCALED_TOGETHER = 256  # numbers of an 8-bit moment that share a float32 scale (Dettmers et al. 2022)


def check_optimizer(settings: LearnerTable) -> None:
    """ValueError: the recipe names an optimizer whose library is not installed."""
    if settings.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            'learner.optimizer is "adamw_8bit", which needs bitsandbytes, and that is not installed: '
            'pip install "ray-ddpo[8bit]", or set learner.optimizer to "adamw"'
        )


def optimizer_of(parameters: Mapping[str, nn.Parameter], settings: LearnerTable) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on these parameters. ValueError: its library is not installed."""
    keys: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), **keys, fused=True)
    check_optimizer(settings)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] -- an extra

    lay_out(parameters, settings)
    return AdamW8bit(parameters.values(), **keys)


def is_fused(optimizer: Any) -> bool:
    """Return whether the optimizer itself looks at `found_inf`, on the device, and then leaves everything as it is."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def lay_out(parameters: Mapping[str, nn.Parameter], settings: LearnerTable) -> None:
    """Give parameters the memory layout that the optimizer needs.

    In 8 bits numbers count in memory's order: channels last, a block of them would be another after a resume.
    """
    if settings.optimizer == "adamw_8bit":
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous()


def optimizer_arrays(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """A copy of its state, by "<parameter>/<the optimizer's own key>"."""
    return {
        f"{name}/{key}": _copied(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _copied(value: Tensor | int) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.array(value)
    array = value.detach().cpu().contiguous().numpy()
    return array.copy() if value.device.type == "cpu" else array  # elsewhere it is a copy already


def load_optimizer_arrays(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, np.ndarray]
) -> None:
    """Put what `optimizer_arrays` gave of these parameters, and perhaps of others, in the place of its state."""
    optimizer.state.clear()
    for place, array in arrays.items():
        name, _, key = place.rpartition("/")
        if name in parameters:
            optimizer.state[parameters[name]][key] = _live(array, parameters[name])


def _live(array: np.ndarray, parameter: nn.Parameter) -> Tensor | int:
    if array.ndim == 0 and array.dtype.kind == "i":  # bitsandbytes counts its steps in a plain number
        return int(array)
    value = torch.from_numpy(array.copy())
    # In the parameter's own memory layout, as AdamW made it; fused, it has its step count on the device too.
    like = parameter if value.shape == parameter.shape else parameter.new_empty(value.shape)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def optimizer_state_bytes(settings: LearnerTable, sizes: PolicySizes) -> int:
    """What the optimizer keeps of the trained parameters.

    Tensors under 4,096 numbers have float32 moments in 8 bits too: hardly any of a whole network, and most of a LoRA.
    """
    whole_network = sizes.trained_parameters == sizes.network_parameters
    if settings.optimizer == "adamw_8bit" and whole_network:
        return round(2 * (1 + 4 / SCALED_TOGETHER) * sizes.trained_parameters)
    return ADAM_STATE_BYTES * sizes.trained_parameters


def with_rank_optimizer_state(settings: LearnerTable, sizes: PolicySizes) -> PolicySizes:
    """The sizes, whose learner has float32 moments of all, with those that a rank of this one has."""
    saved = ADAM_STATE_BYTES * sizes.trained_parameters - rank_optimizer_state_bytes(settings, sizes)
    return replace(sizes, learner=sizes.learner.plus(-saved))


def rank_optimizer_state_bytes(settings: LearnerTable, sizes: PolicySizes) -> int:
    """What a rank keeps of the moments; where they are divided, but for how evenly whole parameters can be."""
    return -(-optimizer_state_bytes(settings, sizes) // (settings.world_size if settings.shard_optimizer_state else 1))
