"""WeightShards: one rank's rows of a policy version's weights, and the full weights gathered in pieces."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from ray_ddpo.common.diffusion.lora.adapters import as_tensor, trained_parameters
from ray_ddpo.common.policy_weights import Manifest, PolicyWeights, verified
from ray_ddpo.learner.process_group import BUCKET_BYTES, ProcessGroup
from ray_ddpo.learner.sharding.layout import rows_of, shard_numel, shard_shape
from ray_ddpo.learner.sharding.sharded_network import local_shards


@dataclass(frozen=True)
class WeightShards:
    """A rank's rows of one version's trained parameters, in float32. Ranks have the same manifest and fingerprint."""

    policy_version: int
    shards: Mapping[str, np.ndarray]
    manifest: Manifest  # of the full parameters
    fingerprint: str  # of the full weights: that of an unsharded learner with the same bits

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return this rank's rows by parameter name."""
        return self.shards


def read_shards(network: nn.Module, policy_version: int, process_group: ProcessGroup) -> WeightShards:
    """Return a copy of this rank's rows of a sharded network's trained parameters. A collective."""
    manifest = tuple((name, tuple(value.shape)) for name, value in trained_parameters(network).items())
    shards = {
        name: value.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, value in local_shards(network).items()
    }
    return fingerprinted(policy_version, shards, manifest, process_group)


def fingerprinted(
    policy_version: int, shards: Mapping[str, np.ndarray], manifest: Manifest, process_group: ProcessGroup
) -> WeightShards:
    """Return shards with the fingerprint of the full weights, which every rank computes. A collective."""
    digest = hashlib.sha256(json.dumps(manifest).encode())
    for array in gathered(shards, manifest, process_group):
        digest.update(array.data)
    return WeightShards(policy_version, shards, manifest, digest.hexdigest())


def shards_of(weights: PolicyWeights, process_group: ProcessGroup) -> WeightShards:
    """Return a copy of this rank's rows of full weights.

    Raises:
        ValueError: The weights were changed in transit.
    """
    rank, world_size = process_group.rank, process_group.world_size
    shards = {
        name: array[rows_of(len(array), rank, world_size)].copy() for name, array in verified(weights).arrays().items()
    }
    return WeightShards(weights.policy_version, shards, weights.manifest, weights.fingerprint)


@torch.no_grad()
def load_shards(network: nn.Module, weights: WeightShards) -> None:
    """Load a rank's rows into a sharded network.

    Raises:
        ValueError: The weights are those of another network.
    """
    own = local_shards(network)
    expected = {name: tuple(value.shape) for name, value in trained_parameters(network).items()}
    if expected != dict(weights.manifest):
        differing = sorted({name for name, _ in expected.items() ^ dict(weights.manifest).items()})[:3]
        raise ValueError(f"weights of version {weights.policy_version} do not fit the network at {differing}")
    for name, array in weights.shards.items():
        own[name].copy_(as_tensor(array))


def averaged_shards(old: WeightShards, new: WeightShards, decay: float, process_group: ProcessGroup) -> WeightShards:
    """Return the moving average `decay` · old + (1 − `decay`) · new, under the version of `new`. A collective."""
    shards = {
        name: np.float32(decay) * old.shards[name] + np.float32(1 - decay) * array for name, array in new.shards.items()
    }
    return fingerprinted(new.policy_version, shards, new.manifest, process_group)


def gathered(
    shards: Mapping[str, np.ndarray], manifest: Manifest, process_group: ProcessGroup
) -> Iterator[Float[np.ndarray, "..."]]:
    """Yield the full parameters in order, on every rank. A collective, to be consumed to its end.

    At most BUCKET_BYTES of them, or a single larger one, are in memory at a time.
    """
    for bucket in buckets(manifest, BUCKET_BYTES):
        yield from _gathered_bucket(shards, bucket, process_group)


def _gathered_bucket(
    shards: Mapping[str, np.ndarray], bucket: Manifest, process_group: ProcessGroup
) -> list[np.ndarray]:
    """Gather the parameters of one bucket in a single collective."""
    world_size = process_group.world_size
    sizes = [[shard_numel(shape, rank, world_size) for _, shape in bucket] for rank in range(world_size)]
    own = np.concatenate([shards[name].ravel() for name, _ in bucket])
    rows = process_group.all_gather_rows(torch.from_numpy(own), [sum(each) for each in sizes])
    parts = [row.split(each) for row, each in zip(rows, sizes, strict=True)]
    whole = []
    for index, (_, shape) in enumerate(bucket):
        of_ranks = [
            part[index].reshape(shard_shape(shape, rank, world_size)) for rank, part in enumerate(parts) if len(part)
        ]
        whole.append(torch.cat(of_ranks).numpy())
    return whole


def buckets(manifest: Manifest, limit: int) -> Iterator[Manifest]:
    """Group parameters, in their order, into buckets of at most `limit` bytes; a larger parameter is a bucket alone."""
    bucket: list[tuple[str, tuple[int, ...]]] = []
    held = 0
    for name, shape in manifest:
        size = 4 * math.prod(shape)
        if bucket and held + size > limit:
            yield tuple(bucket)
            bucket, held = [], 0
        bucket.append((name, shape))
        held += size
    if bucket:
        yield tuple(bucket)


def whole_weights(
    weights: WeightShards, process_group: ProcessGroup, on_this_rank: bool = True
) -> PolicyWeights | None:
    """Gather the full weights, parameter by parameter, into one buffer in the host's memory. A collective.

    Args:
        on_this_rank: keep them. Otherwise this rank only takes part, and returns None.
    """
    buffer = np.empty(sum(math.prod(shape) for _, shape in weights.manifest) if on_this_rank else 0, np.float32)
    _fill(buffer, gathered(weights.shards, weights.manifest, process_group))
    if not on_this_rank:
        return None
    return PolicyWeights(weights.policy_version, buffer, weights.manifest, weights.fingerprint)


def _fill(buffer: Float[np.ndarray, "N"], arrays: Iterable[np.ndarray]) -> None:
    """Copy arrays one behind the other into a buffer, or discard them if the buffer is empty."""
    start = 0
    for array in arrays:
        if buffer.size:
            buffer[start : start + array.size] = array.ravel()
            start += array.size
