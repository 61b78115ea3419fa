"""Load other weights into a network temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_ddpo.common.diffusion.lora.adapters import load_weights
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.learner.sharding.weight_shards import WeightShards, load_shards

HeldWeights = PolicyWeights | WeightShards  # as a rank holds a version: whole, or its shards


@contextmanager
def temporary_weights(network: Any, wanted: HeldWeights, present: HeldWeights) -> Iterator[None]:
    """Load `wanted` into the network, and at exit `present`, its weights before, to the same bits."""
    if wanted.fingerprint == present.fingerprint:
        yield
        return
    load_held(network, wanted)
    try:
        yield
    finally:
        load_held(network, present)


def load_held(network: Any, weights: HeldWeights) -> None:
    """Load a version into the network, or a rank's shards of it into a sharded network."""
    if isinstance(weights, WeightShards):
        load_shards(network, weights)
    else:
        load_weights(network, weights)
