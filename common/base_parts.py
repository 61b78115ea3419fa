"""What a run stands on, fingerprinted part by part: model files, prompts, weights of rewards, a user's own modules.

The fingerprint is the SHA-256 of the files' contents, read again at every start: neither path nor time of change is trusted.
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
# Whose files are what trained weights fit to, and to nothing else.
MODEL_KEYS = ("policy.model", "policy.single_file_config", "policy.lora.path")
READERS = 4  # files that are hashed at once
SHOWN = 12  # letters of a fingerprint


class BasePart(BaseModel):
    """One part: where it was read, on which machine, and the fingerprint of its contents."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    host: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256[:SHOWN]} ({self.path} on {self.host})"


Base = dict[str, BasePart]  # by the recipe's key, such as policy.model/unet or reward.head of aesthetic
BASE = TypeAdapter(Base)


def read_base(data: bytes, where: str) -> Base:
    """Read the fingerprints that a run has kept. ValueError: something else stands there."""
    try:
        return BASE.validate_json(data)
    except ValidationError as error:
        raise ValueError(
            f"{where} cannot be used: it must have path, host and sha256 of each part that the run stands on "
            f"({error.errors()[0]['msg']})"
        ) from None


def as_tables(base: Mapping[str, BasePart]) -> dict[str, Any]:
    """Return the same as JSON takes it."""
    return {name: part.model_dump() for name, part in sorted(base.items())}


def entry_base(entry: Component, table: str, files: Iterable[Weights] = (), label: str = "") -> Base:
    """Fingerprint the files that an entry of a recipe reads and the user's modules that it is made of.

    `label`: which of several rewards it is.
    """
    of = f" of {label}" if label else ""
    parts: dict[str, list[Path]] = {}
    for weights in files:
        for below, paths in _by_folder(weights).items():
            parts[f"{weights.key}{of}{below}"] = paths
    for key, module in entry.user_modules().items():
        for name, file in user_sources(module).items():
            parts[f"{table}.{key}{of}" + (f"/{name}" if name != module else "")] = [file]
    texts = {f"{table}.{key}{of}": text for key, text in entry.user_texts().items()}
    return {name: text_part(text, "a Python object") for name, text in texts.items()} | _fingerprinted(parts)


def text_part(text: str, what: str) -> BasePart:
    """Fingerprint a text that lies in no file."""
    return BasePart(path=what, host=socket.gethostname(), sha256=hashlib.sha256(text.encode()).hexdigest())


def _by_folder(weights: Weights) -> dict[str, list[Path]]:
    """The files of each folder below the source, which are a part each; those in none are one together."""
    found: dict[str, list[Path]] = {}
    for file, path in files_here(weights).items():
        folder, _, _ = file.rpartition("/")
        found.setdefault(f"/{folder}" if folder else "", []).append(path)
    return {below: _without_variants(paths) for below, paths in found.items()}


def _without_variants(paths: list[Path]) -> list[Path]:
    """Leave out what nobody loads where the usual files are there too; others may come beside them at any time."""
    weights = [path for path in paths if path.suffix in (".safetensors", ".bin")]
    usual = [path for path in weights if not VARIANT.fullmatch(path.name)]
    unread = set(weights) - set(usual) if usual else set()
    return [path for path in paths if path not in unread and ".index." not in path.name]


def _fingerprinted(parts: dict[str, list[Path]]) -> Base:
    host = socket.gethostname()
    with ThreadPoolExecutor(READERS) as pool:  # hashlib lets other threads run meanwhile
        digests = dict(zip(parts, pool.map(_fingerprint, parts.values()), strict=True))
    return {
        name: BasePart(path=str(paths[0] if len(paths) == 1 else paths[0].parent), host=host, sha256=digests[name])
        for name, paths in parts.items()
        if paths
    }


def _fingerprint(paths: list[Path]) -> str:
    """Of one file its SHA-256, as sha256sum prints it; of several that of their names and SHA-256s."""
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
    """Return of each part that is another one now what it was and is, in words."""
    both = [name for name in before if name in now]
    return {
        name: f"{name} was {before[name]} and is {now[name]}"
        for name in both
        if before[name].sha256 != now[name].sha256
    }


class LoadedBase:
    """What the roles of a run have loaded; each report is compared with the others' and with what the run stood on before."""

    def __init__(self, before: Base | None = None, refuse: Callable[[dict[str, str]], str] | None = None) -> None:
        """`refuse`: what to say where parts are others than `before`, which are given in words."""
        self._before = before or {}
        self._refuse = refuse
        self._now: Base = {}
        self._by: dict[str, str] = {}

    @property
    def parts(self) -> Base:
        """All that was reported, and what nobody has loaded this time as it was before."""
        return self._before | self._now

    def take(self, who: str, loaded: Base) -> None:
        """Note what one process has loaded. ValueError: it is not what the run stood on, or not what another one has."""
        for name, part in loaded.items():
            first = self._now.get(name)
            if first is not None and first.sha256 != part.sha256:
                raise ValueError(
                    f"{who} has loaded another {name} than {self._by[name]}: {part} and not {first}; every process must "
                    "read the same: copy the right file to where the other one is"
                )
        differing = differing_parts(self._before, loaded)
        if differing:
            assert self._refuse, "who gives what there was before says what to do where it is another"
            raise ValueError(f"{self._refuse(differing)} (loaded by {who})")
        self._now = loaded | self._now
        self._by = dict.fromkeys(loaded, who) | self._by
