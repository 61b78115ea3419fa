"""Load other weights into a network temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_ddpo.common.diffusion.lora.adapters import load_weights
from ray_ddpo.common.policy_weights import PolicyWeights


@contextmanager
def temporary_weights(network: Any, wanted: PolicyWeights, present: PolicyWeights) -> Iterator[None]:
    """Load `wanted` into the network, and at exit `present`, its weights before, to the same bits."""
    if wanted.fingerprint == present.fingerprint:
        yield
        return
    load_weights(network, wanted)
    try:
        yield
    finally:
        load_weights(network, present)
