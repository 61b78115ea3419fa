"""PolicyWeights: what the learner publishes and samplers load, as one flat buffer with proof of what is in it."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Manifest = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each parameter, in the buffer's order
PIECE = 2**24  # numbers that are worked on at once


@dataclass(frozen=True)
class PolicyWeights:
    """The trained parameters of one policy version. One buffer: Ray ships it without a copy (a dict of tensors is slower)."""

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
        """Views of the buffer by the parameter's name, in its shape."""
        views, start = {}, 0
        for name, shape in self.manifest:
            size = int(np.prod(shape))
            views[name] = self.buffer[start : start + size].reshape(shape)
            start += size
        return views


def fingerprint(buffer: np.ndarray, manifest: Manifest) -> str:
    """SHA-256 of names, shapes and bits: equal exactly where two sets of weights are equal to the last bit."""
    digest = hashlib.sha256(json.dumps(manifest).encode())
    digest.update(np.ascontiguousarray(buffer).data)
    return digest.hexdigest()


def pack(policy_version: int, arrays: dict[str, np.ndarray]) -> PolicyWeights:
    """Lay named arrays one after the other, in float32."""
    shapes = {name: array.shape for name, array in arrays.items()}
    return packed(policy_version, shapes, arrays.values())


def packed(policy_version: int, shapes: Mapping[str, Sequence[int]], arrays: Iterable[np.ndarray]) -> PolicyWeights:
    """The same of arrays that come one at a time: of a whole network there is then one copy, and not two."""
    manifest = tuple((name, tuple(int(size) for size in shape)) for name, shape in shapes.items())
    buffer = np.empty(sum(math.prod(shape) for _, shape in manifest), np.float32)
    start = 0
    for (_, shape), array in zip(manifest, arrays, strict=True):
        end = start + math.prod(shape)
        buffer[start:end] = array.ravel()
        start = end
    return PolicyWeights(policy_version, buffer, manifest, fingerprint(buffer, manifest))


def verified(weights: PolicyWeights) -> PolicyWeights:
    """The weights, if they are what they claim to be. ValueError: they were changed on the way."""
    actual = fingerprint(weights.buffer, weights.manifest)
    if actual != weights.fingerprint:
        raise ValueError(
            f"weights of version {weights.policy_version} arrived with fingerprint {actual[:12]}, "
            f"and were sent with {weights.fingerprint[:12]}"
        )
    return weights


def averaged(old: PolicyWeights, new: PolicyWeights, decay: float) -> PolicyWeights:
    """The moving average `decay` · old + (1 − `decay`) · new, under the version of `new`."""
    assert old.manifest == new.manifest, "weights of one network"
    buffer = np.empty_like(new.buffer)
    for start in range(0, len(buffer), PIECE):  # or a whole network would take three times its memory on the way
        part = slice(start, start + PIECE)
        buffer[part] = np.float32(decay) * old.buffer[part] + np.float32(1 - decay) * new.buffer[part]
    return PolicyWeights(new.policy_version, buffer, new.manifest, fingerprint(buffer, new.manifest))
