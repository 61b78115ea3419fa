"""ShardedOptimizer: one optimizer of several ranks, each of which keeps the moments of its own parameters alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.learner.optimization.optimizer import is_fused, lay_out, optimizer_of
from ray_ddpo.learner.process_group import ProcessGroup


@final
class ShardedOptimizer(torch.optim.Optimizer):
    """The recipe's optimizer with its state divided among ranks (ZeRO's first stage, Rajbhandari et al. 2020).

    A rank moves its own parameters and is sent the others': to the bits of an undivided one, since AdamW knows of each
    number only its own gradient. To what works on gradients, the scaler of float16 for one, it has all parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: LearnerTable, ranks: ProcessGroup) -> None:
        """ValueError: there are more ranks than parameters; the optimizer's library is not installed."""
        super().__init__(parameters.values(), {})
        if len(parameters) < ranks.world_size:
            raise ValueError(
                f"learner.world_size is {ranks.world_size}, and the network has {len(parameters)} trained parameters to divide "
                "among them: give no more ranks than that"
            )
        self._process_group = ranks
        self._parameters = list(parameters.values())
        self._of_rank: list[list[nn.Parameter]] = [[] for _ in range(ranks.world_size)]
        self.owned: dict[str, nn.Parameter] = {}
        owners = owners_of([parameter.numel() for parameter in parameters.values()], ranks.world_size)
        for (name, parameter), owner in zip(parameters.items(), owners, strict=True):
            self._of_rank[owner].append(parameter)
            if owner == ranks.rank:
                self.owned[name] = parameter
        lay_out(parameters, settings)  # those of others too: ranks compute alike
        self._moves: Any = optimizer_of(self.owned, settings)
        self.state = self._moves.state
        self._step_supports_amp_scaling = is_fused(self._moves)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Move all parameters; a collective. RuntimeError: a rank's weights were not those of the others."""
        assert closure is None, "gradients are there already"
        self._process_group.check_equal(self._parameters)  # before what the owners send would hide it
        if is_fused(self._moves):
            self._moves.found_inf = getattr(self, "found_inf", None)
        self._moves.step()
        for rank, parameters in enumerate(self._of_rank):
            self._process_group.broadcast(rank, parameters)


def owners_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank has each parameter: the largest goes first, each to whom has least (Graham 1969).

    No rank has more than the mean and one parameter besides.
    """
    owners, held = [0] * len(sizes), [0] * ranks
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = held.index(min(held))
        held[owners[place]] += sizes[place]
    return owners
