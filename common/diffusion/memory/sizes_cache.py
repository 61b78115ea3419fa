"""Cache of counted sizes on disk, so that a second `ddpo plan` of a model does not import diffusers (seconds)."""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ray_ddpo.common.diffusion.memory.sizes import PolicySizes

FOLDER_VARIABLE = "RAY_DDPO_CACHE"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # other versions may count otherwise
SOURCES = Path(__file__).parents[1]  # and so may other code of this program
SIZES = TypeAdapter(PolicySizes)

_enabled: ContextVar[bool] = ContextVar("sizes_cache_enabled", default=False)


@contextmanager
def sizes_cache() -> Iterator[None]:
    """Use the cache inside the block."""
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


def cached_sizes(key: str, count: Callable[[], PolicySizes]) -> PolicySizes:
    """Return cached sizes, or count them and write them to the cache.

    The key has everything that decides the sizes, but libraries and code of this program.
    """
    if not _enabled.get():
        return count()
    folder = Path(os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or "~/.cache/ray_ddpo"))
    path = folder / "sizes" / f"{_digest(key)}.json"
    with suppress(OSError, ValidationError):  # a missing or damaged file is written again
        return SIZES.validate_json(path.read_bytes())
    sizes = count()
    with suppress(OSError):  # a home that cannot be written to only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(SIZES.dump_json(sizes))
        part.replace(path)
    return sizes


def _digest(key: str) -> str:
    """Return a digest of the key, the libraries' versions and the code that counts."""
    found = hashlib.sha256(key.encode())
    for library in LIBRARIES:
        found.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for file in sorted(SOURCES.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
