"""PolicyWeights: the weights that the learner publishes and samplers load, one flat buffer with its fingerprint."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

Manifest = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each parameter, in the buffer's order
PIECE = 2**24  # elements processed at once


@dataclass(frozen=True)
class PolicyWeights:
    """The trained parameters of one policy version, in one buffer that Ray ships without a copy."""

    policy_version: int
    buffer: Float[np.ndarray, "N"]
    manifest: Manifest
    fingerprint: str

    def __post_init__(self) -> None:
        expected = sum(math.prod(shape) for _, shape in self.manifest)
        if self.buffer.dtype != np.float32 or self.buffer.shape != (expected,):
            raise ValueError(
                f"weights of version {self.policy_version} are {self.buffer.dtype} {self.buffer.shape}: "
                f"their manifest says float32 ({expected},)"
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return views of the buffer by parameter name, in each parameter's shape."""
        views, start = {}, 0
        for name, shape in self.manifest:
            size = int(np.prod(shape))
            views[name] = self.buffer[start : start + size].reshape(shape)
            start += size
        return views


@runtime_checkable
class Versioned(Protocol):
    """Weights of a policy version, whole or in part."""

    @property
    def policy_version(self) -> int:
        """The number of rounds that the weights were trained on."""
        ...


V = TypeVar("V", bound=Versioned)


def weights_of(kept: Sequence[V], policy_version: int) -> V:
    """Return the weights of a version that must be among those `kept`."""
    return next(weights for weights in kept if weights.policy_version == policy_version)


def fingerprint(buffer: np.ndarray, manifest: Manifest) -> str:
    """Return the SHA-256 of names, shapes and bits.

    Fingerprints are equal exactly if the weights are equal to the last bit.
    """
    digest = hashlib.sha256(json.dumps(manifest).encode())
    digest.update(np.ascontiguousarray(buffer).data)
    return digest.hexdigest()


def pack(policy_version: int, arrays: dict[str, np.ndarray]) -> PolicyWeights:
    """Concatenate named arrays in float32."""
    shapes = {name: array.shape for name, array in arrays.items()}
    return packed(policy_version, shapes, arrays.values())


def packed(policy_version: int, shapes: Mapping[str, Sequence[int]], arrays: Iterable[np.ndarray]) -> PolicyWeights:
    """Concatenate arrays that arrive one at a time, so that a full network is copied only once."""
    manifest = tuple((name, tuple(int(size) for size in shape)) for name, shape in shapes.items())
    buffer = np.empty(sum(math.prod(shape) for _, shape in manifest), np.float32)
    start = 0
    for (_, shape), array in zip(manifest, arrays, strict=True):
        end = start + math.prod(shape)
        buffer[start:end] = array.ravel()
        start = end
    return PolicyWeights(policy_version, buffer, manifest, fingerprint(buffer, manifest))


def verified(weights: PolicyWeights) -> PolicyWeights:
    """Return the weights if their fingerprint is correct.

    Raises:
        ValueError: They were changed in transit.
    """
    actual = fingerprint(weights.buffer, weights.manifest)
    if actual != weights.fingerprint:
        raise ValueError(
            f"weights of version {weights.policy_version} arrived with fingerprint {actual[:12]}, "
            f"and were sent with {weights.fingerprint[:12]}"
        )
    return weights


def averaged(old: PolicyWeights, new: PolicyWeights, decay: float) -> PolicyWeights:
    """Return the moving average `decay` · old + (1 − `decay`) · new, under the version of `new`."""
    assert old.manifest == new.manifest, "weights of one network"
    buffer = np.empty_like(new.buffer)
    for start in range(0, len(buffer), PIECE):  # at once, a full network would need three times its memory
        part = slice(start, start + PIECE)
        buffer[part] = np.float32(decay) * old.buffer[part] + np.float32(1 - decay) * new.buffer[part]
    return PolicyWeights(new.policy_version, buffer, new.manifest, fingerprint(buffer, new.manifest))
