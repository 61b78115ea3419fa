"""How a rank holds policy versions: whole, or its shards of them if the network is sharded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from ray_ddpo.common.diffusion.lora.adapters import read_weights
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.policy_weights import PolicyWeights, averaged
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.sharding.sharded_network import filled, unsharded_twin
from ray_ddpo.learner.sharding.weight_shards import (
    WeightShards,
    averaged_shards,
    read_shards,
    shards_of,
    whole_weights,
)
from ray_ddpo.learner.temporary_weights import HeldWeights, temporary_weights


class WeightsHolder(ABC):
    """Reads, averages and publishes the weights of a policy's network, as a rank holds them."""

    @abstractmethod
    def read(self, policy_version: int) -> Any:
        """Return a copy of the trained weights. A collective if they are sharded."""

    @abstractmethod
    def held(self, weights: PolicyWeights) -> Any:
        """Return this rank's part of full weights."""

    @abstractmethod
    def averaged(self, old: Any, new: Any, decay: float) -> Any:
        """Return the moving average of two versions. A collective if they are sharded."""

    @abstractmethod
    def whole(self, weights: Any, on_this_rank: bool = True) -> PolicyWeights | None:
        """Return the full weights; None if `on_this_rank` is False. A collective if they are sharded."""

    @abstractmethod
    def saving(self, weights: PolicyWeights | None, present: HeldWeights) -> Any:
        """Let the policy's network have these weights for the body, which saves them; None: those it has."""


@final
class WholeWeights(WeightsHolder):
    """Every rank holds all weights."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def read(self, policy_version: int) -> PolicyWeights:
        return read_weights(self._policy.network, policy_version)

    def held(self, weights: PolicyWeights) -> PolicyWeights:
        return weights

    def averaged(self, old: PolicyWeights, new: PolicyWeights, decay: float) -> PolicyWeights:
        return averaged(old, new, decay)

    def whole(self, weights: PolicyWeights, on_this_rank: bool = True) -> PolicyWeights:
        return weights

    @contextmanager
    def saving(self, weights: PolicyWeights | None, present: PolicyWeights) -> Iterator[None]:
        with temporary_weights(self._policy.network, weights or present, present):
            yield


@final
class ShardedWeights(WeightsHolder):
    """Every rank holds its shards of a network. Make it before the network is sharded."""

    def __init__(self, policy: Policy, process_group: ProcessGroup) -> None:
        self._policy = policy
        self._process_group = process_group
        self._twin = unsharded_twin(policy.network)

    def read(self, policy_version: int) -> WeightShards:
        return read_shards(self._policy.network, policy_version, self._process_group)

    def held(self, weights: PolicyWeights) -> WeightShards:
        return shards_of(weights, self._process_group)

    def averaged(self, old: WeightShards, new: WeightShards, decay: float) -> WeightShards:
        return averaged_shards(old, new, decay, self._process_group)

    def whole(self, weights: WeightShards, on_this_rank: bool = True) -> PolicyWeights | None:
        return whole_weights(weights, self._process_group, on_this_rank)

    @contextmanager
    def saving(self, weights: PolicyWeights | None, present: WeightShards) -> Iterator[None]:
        """Put the weights into a copy of the network whose parameters are on the meta device otherwise."""
        assert weights is not None, "a rank alone has not the full weights: the driver gives them"
        network = self._policy.network
        try:
            with filled(self._twin, weights.arrays()):
                self._policy.network = self._twin
                yield
        finally:
            self._policy.network = network
