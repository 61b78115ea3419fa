"""The recipe's optimizer, the size of its state, and that state as arrays for a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.packages import require_packages
from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.learner.sharding.layout import shards_weights

GRADIENT_BYTES = 4  # per trained number
ADAM_STATE_BYTES = 8  # per trained number: Adam's m and v in float32
SCALED_TOGETHER = 256  # numbers of 8-bit state that share a float32 scale (Dettmers et al. 2022)


def check_optimizer(settings: LearnerTable) -> None:
    """Check that the optimizer can be made.

    Raises:
        ValueError: its library is not installed.
    """
    if settings.optimizer == "adamw_8bit":
        require_packages(f"learner.optimizer = {settings.optimizer!r}", "bitsandbytes")


def optimizer_of(parameters: Mapping[str, nn.Parameter], settings: LearnerTable) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019) on these parameters.

    Raises:
        ValueError: the optimizer's library is not installed.
    """
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

    set_memory_format(parameters, settings)
    return AdamW8bit(parameters.values(), **keys)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def is_fused(optimizer: Any) -> bool:
    """Return whether the optimizer itself reads `found_inf` on the device, and then skips the step."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def set_memory_format(parameters: Mapping[str, nn.Parameter], settings: LearnerTable) -> None:
    """Convert parameters to the memory format that the optimizer needs.

    The 8-bit optimizer groups numbers into blocks in memory order. In channels_last format, a block would hold other
    numbers after a resume.
    """
    if settings.optimizer == "adamw_8bit":
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous()


def optimizer_arrays(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """Return a copy of the optimizer state, by "<parameter>/<key of the optimizer>"."""
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
    """Replace the optimizer state by the arrays of `optimizer_arrays`. Arrays of other parameters are ignored."""
    optimizer.state.clear()
    for path, array in arrays.items():
        name, _, key = path.rpartition("/")
        if name in parameters:
            optimizer.state[parameters[name]][key] = _live(array, parameters[name])


def _live(array: np.ndarray, parameter: nn.Parameter) -> Tensor | int:
    if array.ndim == 0 and array.dtype.kind == "i":  # bitsandbytes counts its steps in a plain number
        return int(array)
    value = torch.from_numpy(array.copy())
    # In the parameter's memory format, as AdamW made it. The fused AdamW has its step count on the device too.
    like = parameter if value.shape == parameter.shape else parameter.new_empty(value.shape)
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def optimizer_state_bytes(settings: LearnerTable, sizes: PolicySizes) -> int:
    """Return the size of the optimizer state.

    The 8-bit optimizer keeps float32 state for tensors under 4,096 numbers: hardly any of a full network, and most of a
    LoRA.
    """
    full_network = sizes.trained_parameters == sizes.network_parameters
    if settings.optimizer == "adamw_8bit" and full_network:
        return round(2 * (1 + 4 / SCALED_TOGETHER) * sizes.trained_parameters)
    return ADAM_STATE_BYTES * sizes.trained_parameters


def rank_sizes(settings: LearnerTable, sizes: PolicySizes) -> PolicySizes:
    """Return the sizes of one rank of this learner, in place of those of a learner that holds everything in float32."""
    saved = ADAM_STATE_BYTES * sizes.trained_parameters - rank_optimizer_state_bytes(settings, sizes)
    if shards_weights(settings) and sizes.units.weights:
        held = sizes.units.weights + GRADIENT_BYTES * sizes.trained_parameters
        saved += held - rank_weight_bytes(settings, sizes) - sizes.units.gathered
        saved += round(
            sizes.units.cached * (1 - sizes.units.largest / sizes.units.weights)
        )  # a block's copies are left
        if settings.offload_weights:  # the host has the shards
            saved += rank_weight_bytes(settings, sizes) + rank_optimizer_state_bytes(settings, sizes)
    return replace(sizes, learner=sizes.learner.plus(-saved))


def rank_optimizer_state_bytes(settings: LearnerTable, sizes: PolicySizes) -> int:
    """Return the size of a rank's optimizer state. If sharded, ranks differ by up to one parameter from this size."""
    is_sharded = settings.shard_optimizer_state or shards_weights(settings)
    return -(-optimizer_state_bytes(settings, sizes) // (settings.world_size if is_sharded else 1))


def rank_weight_bytes(settings: LearnerTable, sizes: PolicySizes) -> int:
    """Return the size of a rank's weights and gradients, without the blocks that it gathers."""
    held = sizes.units.weights + GRADIENT_BYTES * sizes.trained_parameters
    return -(-held // (settings.world_size if shards_weights(settings) else 1))
