"""Shard a network over the ranks with FSDP2, and give the optimizer each parameter's shard as a plain tensor.

FSDP2 is imported where it is used: it takes most of a second, and `ddpo plan` and `ddpo status` need none.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ray_ddpo.common.diffusion.lora.adapters import as_tensor, trained_parameters
from ray_ddpo.common.diffusion.units import units_of
from ray_ddpo.common.diffusion.unread_weights import replace_parameter


def shard_network(network: nn.Module, mesh: DeviceMesh, offload: bool = False) -> None:
    """Shard every parameter of a network, trained or frozen, over the ranks of `mesh` (FSDP2, Zhao et al. 2023).

    A forward or backward pass gathers the parameters of one unit at a time, in their own dtype, and frees them behind
    it. So the network computes what it does unsharded, and no precision is lost. Gradients are summed over the ranks.
    Units are moved to the mesh's device one after the other: the device never holds the full network.

    Args:
        network: in contiguous memory format.
        mesh: one axis, of all ranks.
        offload: keep the shards in the host's memory. Gradients and optimizer state are then there too.

    Raises:
        ValueError: A parameter has no axis that could be sharded.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    check_shardable(network)
    _ignore_views_of_diffusers([*units_of(network), network])
    keys: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,  # the root too: weights change between a pass without gradient and the next
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for unit in units_of(network):
        fully_shard(unit, **keys)
    fully_shard(network, **keys)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the transitions of all ranks already
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _ignore_views_of_diffusers(units: list[nn.Module]) -> None:
    """Ignore FSDP2's warning of units that return views, such as FLUX's single blocks, if they are of diffusers.

    An operation in place on such an output would drop the hook that gathers the unit's weights in the backward pass.
    As this package calls them, diffusers' networks change no output in place. A user's own network may do so.
    """
    names = "|".join(sorted({type(unit).__name__ for unit in units if type(unit).__module__.startswith("diffusers.")}))
    if names:
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP({names})\) returned a view tensor")


def check_shardable(network: nn.Module) -> None:
    """Check that every parameter can be sharded.

    Raises:
        ValueError: A parameter has no axis.
    """
    for name, parameter in network.named_parameters():
        if not parameter.ndim:
            raise ValueError(
                f"learner.shard_weights is true, and the parameter {name} of {type(network).__name__} is a single "
                "number without an axis to shard: make it a tensor of shape (1,)"
            )


def local_shards(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return this rank's shards of the trained parameters, as parameters that share their memory.

    The optimizer steps these. It needs to know nothing of the other ranks.
    """
    return {name: nn.Parameter(shard) for name, shard in _local(network)}


def collect_gradients(network: nn.Module, shards: dict[str, nn.Parameter]) -> None:
    """Give each shard the gradient of its rows, which the backward passes have summed over the ranks; a missing one as 0."""
    for name, parameter in trained_parameters(network).items():
        shard, gradient = shards[name], parameter.grad
        assert shard.data_ptr() == _local_tensor(parameter).data_ptr(), "the optimizer steps the network's own memory"
        shard.grad = torch.zeros_like(shard) if gradient is None else _local_tensor(gradient)


def clear_gradients(network: nn.Module, shards: dict[str, nn.Parameter]) -> None:
    """Forget all gradients."""
    for parameter in (*trained_parameters(network).values(), *shards.values()):
        parameter.grad = None


def _local(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, _local_tensor(parameter)) for name, parameter in trained_parameters(network).items())


def _local_tensor(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    detached = tensor.detach()
    assert isinstance(detached, DTensor), "every parameter is sharded"
    return detached.to_local()


def unsharded_twin(network: nn.Module) -> nn.Module:
    """Return a copy of a network that is not sharded yet, with its parameters on the meta device, for `filled`."""
    known: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, known)


@contextmanager
def filled(twin: nn.Module, arrays: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Give the twin these trained parameters for the duration of the body, without a copy."""
    before = trained_parameters(twin)
    assert before.keys() == arrays.keys(), "weights of one network"
    try:
        for name, parameter in before.items():
            replace_parameter(twin, name, nn.Parameter(as_tensor(arrays[name]).to(parameter.dtype)))
        yield
    finally:
        for name, parameter in before.items():
            replace_parameter(twin, name, parameter)
