"""The rows of each parameter that a rank holds: FSDP2 cuts the first axis into chunks of equal length."""

import math
from collections.abc import Sequence

from ray_ddpo.common.recipe.tables import LearnerTable

Shape = tuple[int, ...]


def shards_weights(settings: LearnerTable) -> bool:
    """Return whether each rank of this learner holds only a part of the weights."""
    return settings.shard_weights and settings.world_size > 1


def rows_of(length: int, rank: int, world_size: int) -> slice:
    """Return the rows of a parameter with `length` rows that a rank holds, as `torch.chunk` cuts them.

    The last ranks have fewer rows, or none, if `world_size` does not divide `length`.
    """
    chunk = -(-length // world_size)
    return slice(min(rank * chunk, length), min((rank + 1) * chunk, length))


def shard_shape(shape: Sequence[int], rank: int, world_size: int) -> Shape:
    """Return the shape of a rank's rows of a parameter."""
    rows = rows_of(shape[0], rank, world_size)
    return (rows.stop - rows.start, *shape[1:])


def shard_numel(shape: Sequence[int], rank: int, world_size: int) -> int:
    """Return the numbers of a parameter that a rank holds."""
    return math.prod(shard_shape(shape, rank, world_size))


def shard_name(name: str, rank: int, world_size: int) -> str:
    """Return the name of a rank's shard of a parameter in a checkpoint, which no other rank's shard has."""
    return f"{name}.shard-{rank + 1:05d}-of-{world_size:05d}"
