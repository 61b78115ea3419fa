"""A checkpoint's arrays in safetensors files of bounded size, written and read one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

from ray_ddpo.common.run_storage.storage import Storage

SHARD_BYTES = 2**30  # the largest size of a file, unless a single array is larger
BUFFER = "buffer"


@dataclass(frozen=True)
class Shards:
    """The arrays of each shard of `file`, in order, as views of the arrays to save."""

    file: str
    parts: tuple[dict[str, np.ndarray], ...]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and bytes of each shard, one at a time."""
        return (
            (name, save(part)) for name, part in zip(shard_names(self.file, len(self.parts)), self.parts, strict=True)
        )


def shard_names(file: str, count: int) -> list[str]:
    """Return the file names of the shards of `file`: that name alone, or numbered names if there are several."""
    if count == 1:
        return [file]
    stem, dot, suffix = file.rpartition(".")
    return [f"{stem}-{number:05d}-of-{count:05d}{dot}{suffix}" for number in range(1, count + 1)]


def cut(file: str, buffer: np.ndarray, limit: int) -> Shards:
    """Cut a flat buffer into shards of at most `limit` bytes."""
    step = max(1, limit // buffer.itemsize)
    starts = range(0, max(1, len(buffer)), step)
    return Shards(file, tuple({BUFFER: buffer[start : start + step]} for start in starts))


def grouped(file: str, arrays: Mapping[str, np.ndarray], limit: int) -> Shards:
    """Group named arrays, in their order, into shards of at most `limit` bytes."""
    parts: list[dict[str, np.ndarray]] = [{}]
    held = 0
    for name, array in arrays.items():
        if parts[-1] and held + array.nbytes > limit:
            parts.append({})
            held = 0
        parts[-1][name] = array
        held += array.nbytes
    return Shards(file, tuple(parts))


def read_buffer(folder: Storage, file: str, count: int, size: int) -> np.ndarray:
    """Read a buffer of `size` float32 numbers from its shards.

    Raises:
        ValueError: the shards have another number of numbers.
    """
    if count == 1:
        return load(folder.read(file))[BUFFER]
    buffer, start = np.empty(size, np.float32), 0
    for name in shard_names(file, count):
        part = load(folder.read(name))[BUFFER]
        if part.dtype != np.float32 or start + len(part) > size:
            raise ValueError(f"{folder.location}/{name} does not fit a buffer of {size} float32 numbers at {start}")
        buffer[start : start + len(part)] = part
        start += len(part)
    if start != size:
        raise ValueError(
            f"the {count} shards of {folder.location}/{file} hold {start} numbers, and {size} are expected"
        )
    return buffer


def read_arrays(folder: Storage, file: str, count: int) -> dict[str, np.ndarray]:
    """Read named arrays from their shards."""
    found: dict[str, np.ndarray] = {}
    for name in shard_names(file, count):
        found |= load(folder.read(name))
    return found
