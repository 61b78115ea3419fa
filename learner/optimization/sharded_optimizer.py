"""ShardedOptimizer: one optimizer over several ranks, each of which keeps the state of its share of parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.learner.optimization.optimizer import (
    is_fused,
    optimizer_of,
    set_learning_rate,
    set_memory_format,
)
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.sharding.layout import shard_name, shards_weights


def rank_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: LearnerTable, process_group: ProcessGroup
) -> tuple[torch.optim.Optimizer, Mapping[str, nn.Parameter]]:
    """Return a rank's optimizer, and the parameters whose optimizer state the rank keeps.

    Args:
        parameters: all trained ones, or this rank's shards of them if weights are sharded.
    """
    rank, world_size = process_group.rank, process_group.world_size
    if shards_weights(settings):
        owned = {shard_name(name, rank, world_size): shard for name, shard in parameters.items()}
        return optimizer_of(owned, settings), owned
    if not settings.shard_optimizer_state or world_size == 1:
        return optimizer_of(parameters, settings), parameters
    optimizer = ShardedOptimizer(parameters, settings, process_group)
    return optimizer, optimizer.owned


@final
class ShardedOptimizer(torch.optim.Optimizer):
    """The recipe's optimizer with its state sharded across ranks (ZeRO stage 1, Rajbhandari et al. 2020).

    A rank updates its own parameters and receives the others by broadcast. The bits are those of an unsharded
    optimizer, since AdamW updates each number from its own gradient only. `param_groups` has all parameters, for users
    of gradients such as float16's gradient scaler.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: LearnerTable, process_group: ProcessGroup
    ) -> None:
        """Make the optimizer of this rank's parameters.

        Raises:
            ValueError: there are more ranks than parameters, or the optimizer's library is not installed.
        """
        super().__init__(parameters.values(), {"lr": settings.learning_rate})
        if len(parameters) < process_group.world_size:
            raise ValueError(
                f"learner.world_size is {process_group.world_size}, and the network has {len(parameters)} trained "
                "parameters to divide among them: give no more ranks than that"
            )
        self._process_group = process_group
        self._parameters = list(parameters.values())
        self._of_rank: list[list[nn.Parameter]] = [[] for _ in range(process_group.world_size)]
        self.owned: dict[str, nn.Parameter] = {}
        owners = owners_of([parameter.numel() for parameter in parameters.values()], process_group.world_size)
        for (name, parameter), owner in zip(parameters.items(), owners, strict=True):
            self._of_rank[owner].append(parameter)
            if owner == process_group.rank:
                self.owned[name] = parameter
        set_memory_format(parameters, settings)  # also other ranks' parameters, so that all ranks compute alike
        self._optimizer: Any = optimizer_of(self.owned, settings)
        self.state = self._optimizer.state
        self._step_supports_amp_scaling = is_fused(self._optimizer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters. A collective.

        Raises:
            RuntimeError: the weights of a rank differ from those of the others.
        """
        assert closure is None, "gradients are computed already"
        self._process_group.check_equal(self._parameters)  # before the broadcast would hide a difference
        if is_fused(self._optimizer):
            self._optimizer.found_inf = getattr(self, "found_inf", None)
        set_learning_rate(self._optimizer, self.param_groups[0]["lr"])
        self._optimizer.step()
        for rank, parameters in enumerate(self._of_rank):
            self._process_group.broadcast(rank, parameters)


def owners_of(sizes: Sequence[int], world_size: int) -> list[int]:
    """Return the rank that owns each parameter: largest first, each to the rank with the least (Graham 1969).

    No rank has more than the mean plus one parameter.
    """
    owners, held = [0] * len(sizes), [0] * world_size
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = held.index(min(held))
        held[owners[index]] += sizes[index]
    return owners
