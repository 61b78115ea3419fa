"""Shard a network that a learner has loaded, and read this rank's rows of weights that are still in their files."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.unread_weights import UnreadWeights, replace_parameter
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.sharding.layout import rows_of
from ray_ddpo.learner.sharding.sharded_network import shard_network


def shard_loaded(network: nn.Module, group: ProcessGroup, offload: bool, unread: UnreadWeights | None) -> None:
    """Shard a loaded network over the ranks, and fill in the weights that were not read yet. A collective.

    Args:
        network: equal on all ranks.
        group: the ranks, which have joined.
        offload: keep the shards in the host's memory.
        unread: the weights that are still in their files; None: all are loaded.

    Raises:
        RuntimeError: The ranks have loaded or initialized different weights.
        ValueError: A file cannot be read, or a weight is not finite.
    """
    loaded = [value for name, value in trained_parameters(network).items() if not (unread and unread.stored_name(name))]
    if loaded:  # files are compared by their fingerprints instead
        group.check_equal(loaded)  # now, since each shard exists only once
    mesh = group.mesh()
    if unread is None:
        return shard_network(network, mesh, offload)
    shard_unread(network, unread)
    shard_network(network, mesh, offload)
    with group.raise_on_all_ranks():
        read_own_rows(network, unread, mesh, offload)


def shard_unread(network: nn.Module, unread: UnreadWeights) -> None:
    """Put the unread parameters on the meta device, where FSDP2 shards them without memory."""
    for name, parameter in list(network.named_parameters()):
        if unread.stored_name(name):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            replace_parameter(network, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def read_own_rows(network: nn.Module, unread: UnreadWeights, mesh: DeviceMesh, offload: bool) -> None:
    """Fill the shards that are on the meta device with this rank's rows of the weights' files.

    Raises:
        ValueError: A file cannot be read, or a weight is not finite.
    """
    from torch.distributed.tensor import DTensor, Shard

    empty = {name: value for name, value in network.named_parameters() if value.is_meta}
    names = {unread.stored_name(name): name for name in empty}
    assert names.keys() == unread.files.keys(), "each unread parameter has its place in the network"
    rank, world_size = mesh.get_local_rank(), mesh.size()
    rows = {stored: rows_of(len(empty[name]), rank, world_size) for stored, name in names.items() if stored}
    state: dict[str, Any] = {}
    for stored, value in unread.read(rows):
        shape = empty[names[stored]].shape
        stride = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(value, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        state[names[stored]] = sharded.cpu() if offload else sharded
    network.load_state_dict(state, strict=False, assign=True)  # FSDP2 then takes these tensors as its shards
