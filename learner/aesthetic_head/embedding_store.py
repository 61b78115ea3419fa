"""CLIP's embeddings of images on disk, in parquet files that are written atomically: a kill loses at most one."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Float

from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.learner.aesthetic_head.image_files import FileState

PART = re.compile(r"part-(\d{6})\.parquet")
Embedding = Float[np.ndarray, "D"]


@dataclass(frozen=True)
class ClipIdentity:
    """The identity of a CLIP model. A folder has embeddings of one model only."""

    name: str  # a folder or a hub name, as given
    fingerprint: str  # of its weights and the precision it runs in
    dimension: int  # of its embeddings


@dataclass(frozen=True)
class StoredImage:
    """The stored result for an image file: its embedding, or why it has none."""

    state: FileState
    embedding: Embedding | None
    broken: str | None = None


@dataclass
class EmbeddingStore:
    """The embeddings of one CLIP model, by image path. Files are only added: a later row replaces an earlier one."""

    storage: Storage
    clip: ClipIdentity
    known: dict[str, StoredImage] = field(default_factory=dict)
    next_part: int = 0

    @classmethod
    def open(cls, storage: Storage, clip: ClipIdentity) -> "EmbeddingStore":
        """Read the stored embeddings.

        Raises:
            ValueError: they are of another CLIP model.
        """
        storage.sweep()
        store = cls(storage, clip)
        for name in storage.names():
            if match := PART.fullmatch(name):
                store._read(name)
                store.next_part = int(match[1]) + 1
        return store

    def add(self, rows: Mapping[str, StoredImage]) -> None:
        """Write another part, atomically."""
        storage_type = pa.list_(pa.float32(), self.clip.dimension)
        table = pa.table(
            {
                "path": pa.array(list(rows), pa.string()),
                "size": pa.array([row.state.size for row in rows.values()], pa.int64()),
                "modified": pa.array([row.state.modified for row in rows.values()], pa.int64()),
                "broken": pa.array([row.broken for row in rows.values()], pa.string()),
                "embedding": pa.array([row.embedding for row in rows.values()], storage_type),
            }
        )
        identity = {"clip": self.clip.name, "clip_fingerprint": self.clip.fingerprint}
        buffer = io.BytesIO()
        parquet.write_table(table.replace_schema_metadata(identity), buffer)
        self.storage.write(f"part-{self.next_part:06d}.parquet", buffer.getvalue())
        self.next_part += 1
        self.known.update(rows)

    def _read(self, name: str) -> None:
        """Read a part, and raise ValueError if it is of another CLIP model."""
        table = parquet.read_table(pa.BufferReader(self.storage.read(name)))
        identity = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if identity.get("clip_fingerprint") != self.clip.fingerprint:
            raise ValueError(
                f"{self.storage.location} has embeddings of the CLIP {identity.get('clip')!r}, and this one, "
                f"{self.clip.name!r}, has other weights or another precision: take another --output, or remove that "
                "folder"
            )
        rows = zip(*(table.column(key).to_pylist() for key in ("path", "size", "modified", "broken")), strict=True)
        embeddings = iter(_embeddings(table, self.clip.dimension))
        for path, size, modified, broken in rows:
            self.known[path] = StoredImage(FileState(size, modified), None if broken else next(embeddings), broken)


def _embeddings(table: pa.Table, dimension: int) -> Float[np.ndarray, "N D"]:
    """Return the embeddings of the rows that have one, without gaps for nulls."""
    chunks = [chunk.flatten().to_numpy() for chunk in table.column("embedding").chunks]
    return np.concatenate(chunks).reshape(-1, dimension) if chunks else np.empty((0, dimension), np.float32)
