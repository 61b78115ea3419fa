"""LoraWeights: what the learner publishes and samplers load, as one flat buffer with proof of what is in it."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Manifest = tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each parameter, in the buffer's order


@dataclass(frozen=True)
class LoraWeights:
    """The trained parameters of one policy version. One buffer: Ray ships it without a copy (a dict of tensors is slower)."""

    policy_version: int
    buffer: Float[np.ndarray, "N"]
    manifest: Manifest
    fingerprint: str

    def __post_init__(self) -> None:
        expected = sum(int(np.prod(shape)) for _, shape in self.manifest)
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


def pack(policy_version: int, arrays: dict[str, np.ndarray]) -> LoraWeights:
    """Lay named float32 arrays one after the other."""
    manifest = tuple((name, tuple(int(size) for size in array.shape)) for name, array in arrays.items())
    buffer = np.concatenate([np.asarray(array, dtype=np.float32).ravel() for array in arrays.values()])
    return LoraWeights(policy_version, buffer, manifest, fingerprint(buffer, manifest))


def verified(weights: LoraWeights) -> LoraWeights:
    """The weights, if they are what they claim to be. ValueError: they were changed on the way."""
    actual = fingerprint(weights.buffer, weights.manifest)
    if actual != weights.fingerprint:
        raise ValueError(
            f"weights of version {weights.policy_version} arrived with fingerprint {actual[:12]}, "
            f"and were sent with {weights.fingerprint[:12]}"
        )
    return weights


def averaged(old: LoraWeights, new: LoraWeights, decay: float) -> LoraWeights:
    """The moving average `decay` · old + (1 − `decay`) · new, under the version of `new`."""
    assert old.manifest == new.manifest, "weights of one network"
    buffer = np.float32(decay) * old.buffer + np.float32(1 - decay) * new.buffer
    return LoraWeights(new.policy_version, buffer, new.manifest, fingerprint(buffer, new.manifest))
