"""Read what wandb stored of a run on disk, as wandb would sync it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from ray_ddpo.common.trackers.wandb_run import records


def starts(run: Path) -> list[Path]:
    """Return the files of all starts, oldest first."""
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


def history(run: Path) -> list[dict[str, Any]]:
    """Return the rows of all starts in the order of writing. Parts of a nested key are joined by /."""
    found = []
    for record in _records(run):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if items:
            found.append({name: json.loads(value) for name, value in items.items()})
    return found


def _records(run: Path) -> Iterator[Record]:
    return (Record.FromString(data) for file in starts(run) for data in records(file.read_bytes()))


def pixels_of(run: Path, name: str) -> np.ndarray:
    """Return an image's pixels, by its path or by the name in its row."""
    (file,) = [Path(name)] if name.startswith("/") else run.glob(f"wandb/offline-run-*/files/{name}")
    return np.asarray(Image.open(file))


def tables_of(run: Path, key: str) -> list[dict[str, Any]]:
    """Return the tables of a key as wandb's JSON. An image's `path` is that of its file."""
    found = []
    for artifact in (record.artifact for record in _records(run)):
        files = {content.path: content.local_path for content in artifact.manifest.contents}
        if f"{key}.table.json" in files:
            table = json.loads(Path(files[f"{key}.table.json"]).read_text())
            for cell in (cell for row in table["data"] for cell in row if isinstance(cell, dict)):
                cell["path"] = files[cell["path"]]
            found.append(table)
    return found
