"""The gradients of an optimizer step: cleared, summed over the ranks and clipped, if weights are sharded or not."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.sharding.sharded_network import clear_gradients, collect_gradients


class Gradients(ABC):
    """The gradients of the trained parameters that this rank's optimizer steps."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all gradients."""

    @abstractmethod
    def reduce(self) -> None:
        """Give each parameter its gradient, summed over all ranks; a missing one as 0. A collective."""

    @abstractmethod
    def clip(self, limit: float) -> Float[Tensor, ""]:
        """Clip the gradients to a norm of `limit`. Return their norm before, to the same bits on each rank."""

    @abstractmethod
    def check(self) -> None:
        """Check after a step that all ranks have the same weights. A collective."""


@final
class ReplicatedGradients(Gradients):
    """Every rank has all weights, and the gradients of its own transitions until `reduce`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], process_group: ProcessGroup) -> None:
        self._parameters = list(parameters.values())
        self._process_group = process_group

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def reduce(self) -> None:
        self._process_group.all_reduce_gradients(self._parameters)

    def clip(self, limit: float) -> Float[Tensor, ""]:
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)

    def check(self) -> None:
        self._process_group.check_equal(self._parameters)


@final
class ShardedGradients(Gradients):
    """Every rank has a shard of each weight and of its gradient, which backward passes have summed over the ranks."""

    def __init__(self, network: Any, shards: Mapping[str, nn.Parameter], process_group: ProcessGroup) -> None:
        self._network = network
        self._shards = dict(shards)
        self._process_group = process_group

    def clear(self) -> None:
        clear_gradients(self._network, self._shards)

    def reduce(self) -> None:
        collect_gradients(self._network, self._shards)

    def clip(self, limit: float) -> Float[Tensor, ""]:
        """Clip by the norm over all shards: the root of the sum of the ranks' squares, in float64."""
        gradients = [shard.grad for shard in self._shards.values() if shard.grad is not None]
        own = torch.nn.utils.get_total_norm(gradients, foreach=True)
        squares = self._process_group.all_reduce_sum(float(own.double().square()))
        norm = torch.tensor(squares, dtype=torch.float64, device=own.device).sqrt().to(own.dtype)
        torch.nn.utils.clip_grads_with_norm_(self._shards.values(), limit, norm, foreach=True)
        return norm

    def check(self) -> None:
        """Do nothing: each shard exists once, so that no two ranks could differ."""


@final
class GroupGradScaler(torch.amp.GradScaler):
    """A gradient scaler whose ranks skip a step together, although each sees the gradients of its own shards only."""

    def __init__(self, device: str, enabled: bool, process_group: ProcessGroup) -> None:
        super().__init__(device, enabled=enabled)
        self._process_group = process_group

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale, then tell every rank if any rank found an infinite gradient. A collective."""
        super().unscale_(optimizer)
        if self._enabled:
            for found in self._found_inf_per_device(optimizer).values():
                found.fill_(self._process_group.all_reduce_max(float(found)))


def gradient_scaler(device: str, dtype: str, process_group: ProcessGroup | None) -> torch.amp.GradScaler:
    """Return the scaler of gradients, which is enabled in float16 only.

    Args:
        device: of the network.
        dtype: that the network computes in.
        process_group: the ranks, if each has only its own shards of the gradients.
    """
    enabled = dtype == "float16"
    if process_group is None:
        return torch.amp.GradScaler(device, enabled=enabled)
    return GroupGradScaler(device, enabled, process_group)
