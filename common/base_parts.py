"""Fingerprints of everything a run depends on: model files, prompts, reward weights, the user's own modules.

A fingerprint is the SHA-256 of the files' contents. It is computed again at every start: neither paths nor modification
times are trusted.
"""

import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ray_ddpo.common.model_files.model_hub import Weights, files_here
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.common.user_code.sources import user_sources

VARIANT = re.compile(r"[^.]+\.[^.]+\.(safetensors|bin)")  # model.fp16.safetensors beside model.safetensors
# Keys whose files the trained weights depend on.
MODEL_KEYS = ("policy.model", "policy.single_file_config", "policy.lora.path")
READERS = 4  # files hashed at once
SHOWN = 12  # characters of a fingerprint in messages


class BasePart(BaseModel):
    """One part: where it was read, on which machine, and its fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    host: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256[:SHOWN]} ({self.path} on {self.host})"


Base = dict[str, BasePart]  # by recipe key, such as policy.model/unet or reward.head of aesthetic
BASE = TypeAdapter(Base)


def read_base(data: bytes, where: str) -> Base:
    """Parse the fingerprints that a run has stored. Raise ValueError if the data is something else."""
    try:
        return BASE.validate_json(data)
    except ValidationError as error:
        raise ValueError(
            f"{where} cannot be used: it must have path, host and sha256 of each part that the run depends on "
            f"({error.errors()[0]['msg']})"
        ) from None


def as_tables(base: Mapping[str, BasePart]) -> dict[str, Any]:
    """Return the fingerprints as JSON takes them."""
    return {name: part.model_dump() for name, part in sorted(base.items())}


def entry_base(component: Component, table: str, files: Iterable[Weights] = (), label: str = "") -> Base:
    """Fingerprint the files that a component reads and the user's modules that it is made of.

    The parts are named after its table in the recipe and, if it is one of several rewards, its label.
    """
    suffix = f" of {label}" if label else ""
    parts: dict[str, list[Path]] = {}
    for weights in files:
        for below, paths in _by_folder(weights).items():
            parts[f"{weights.key}{suffix}{below}"] = paths
    for key, module in component.user_modules().items():
        for name, file in user_sources(module).items():
            parts[f"{table}.{key}{suffix}" + (f"/{name}" if name != module else "")] = [file]
    texts = {f"{table}.{key}{suffix}": text for key, text in component.user_texts().items()}
    return {name: text_part(text, "a Python object") for name, text in texts.items()} | _fingerprinted(parts)


def text_part(text: str, what: str) -> BasePart:
    """Fingerprint a text that is not in a file."""
    return BasePart(path=what, host=socket.gethostname(), sha256=hashlib.sha256(text.encode()).hexdigest())


def _by_folder(weights: Weights) -> dict[str, list[Path]]:
    """Group the files by folder below the source. Each folder is a part; files directly in the source are one part."""
    found: dict[str, list[Path]] = {}
    for file, path in files_here(weights).items():
        if ".index." not in path.name:
            folder, _, _ = file.rpartition("/")
            found.setdefault(f"/{folder}" if folder else "", []).append(path)
    for below, paths in found.items():
        variants = [path for path in paths if VARIANT.fullmatch(path.name)]
        # Beside the usual files, variants are not loaded, and may be added at any time.
        if any(path.suffix in (".safetensors", ".bin") and path not in variants for path in paths):
            found[below] = [path for path in paths if path not in variants]
    return found


def _fingerprinted(parts: dict[str, list[Path]]) -> Base:
    """Fingerprint every part that has files."""
    host = socket.gethostname()
    with ThreadPoolExecutor(READERS) as pool:  # hashlib releases the GIL
        digests = dict(zip(parts, pool.map(fingerprint, parts.values()), strict=True))
    return {
        name: BasePart(path=str(paths[0] if len(paths) == 1 else paths[0].parent), host=host, sha256=digests[name])
        for name, paths in parts.items()
        if paths
    }


def fingerprint(paths: list[Path]) -> str:
    """Return a single file's SHA-256, as sha256sum prints it; of several files, that of their names and digests."""
    digests = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def differing_parts(before: Mapping[str, BasePart], now: Mapping[str, BasePart]) -> dict[str, str]:
    """Describe each part whose fingerprint has changed: its fingerprint before and now."""
    both = [name for name in before if name in now]
    return {
        name: f"{name} was {before[name]} and is {now[name]}"
        for name in both
        if before[name].sha256 != now[name].sha256
    }


class LoadedBase:
    """The fingerprints that a run's roles have reported, compared with one another and with earlier starts."""

    def __init__(self, before: Base | None = None, refuse: Callable[[dict[str, str]], str] | None = None) -> None:
        """Start with the fingerprints of earlier starts. `refuse` words the error about differing parts."""
        self._before = before or {}
        self._refuse = refuse
        self._now: Base = {}
        self._by: dict[str, str] = {}

    @property
    def parts(self) -> Base:
        """Return all reported parts, and the stored ones that no role has loaded this time."""
        return self._before | self._now

    def take(self, who: str, loaded: Base) -> None:
        """Record what one process has loaded.

        Raises:
            ValueError: A part differs from the stored one, or from what another process has loaded.
        """
        for name, part in loaded.items():
            first = self._now.get(name)
            if first is not None and first.sha256 != part.sha256:
                raise ValueError(
                    f"{who} has loaded another {name} than {self._by[name]}: {part} and not {first}; every process "
                    "must read the same: copy the right file to where the other one is"
                )
        differing = differing_parts(self._before, loaded)
        if differing:
            assert self._refuse, "`before` comes with `refuse`"
            raise ValueError(f"{self._refuse(differing)} (loaded by {who})")
        self._now = loaded | self._now
        self._by = dict.fromkeys(loaded, who) | self._by
