"""StoredWeights: policy weights in Ray's object store, which the driver maps and passes on by reference."""

from dataclasses import dataclass
from typing import Any

import ray

from ray_ddpo.common.policy_weights import PolicyWeights


@dataclass(frozen=True)
class StoredWeights(PolicyWeights):
    """Weights in Ray's object store. `buffer` is a view of the shared memory, not a copy."""

    reference: Any  # to the object


def stored_at(reference: Any) -> StoredWeights:
    """Map the weights that a reference points to into this process's memory."""
    weights: PolicyWeights = ray.get(reference)
    return StoredWeights(weights.policy_version, weights.buffer, weights.manifest, weights.fingerprint, reference)


def reference_to(weights: PolicyWeights) -> Any:
    """Return a reference to weights for actors, and put the weights into the store only if they are not there yet.

    Each node fetches an object once. So all tasks of a version must carry a reference to the same object.
    """
    return weights.reference if isinstance(weights, StoredWeights) else ray.put(weights)
