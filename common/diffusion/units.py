"""The blocks of a network that a learner with sharded weights gathers one at a time."""

from torch import nn


def units_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: the elements of its outermost `nn.ModuleList`s.

    These are a transformer's blocks, and the down and up blocks of a UNet with the layers of its middle block. The
    other parameters, such as embeddings and the last norm, belong to no block. A network without a `nn.ModuleList` has
    none.
    """
    if isinstance(network, nn.ModuleList):
        return [each for each in network if next(each.parameters(), None) is not None]
    return [unit for child in network.children() for unit in units_of(child)]


def parameters_by_unit(network: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each block, then those that belong to no block."""
    units = [list(unit.parameters()) for unit in units_of(network)]
    inside = {id(parameter) for unit in units for parameter in unit}
    return [*units, [parameter for parameter in network.parameters() if id(parameter) not in inside]]
