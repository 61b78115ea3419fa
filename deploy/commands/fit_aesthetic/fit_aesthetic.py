"""ddpo fit-aesthetic: fit an aesthetic head on rated images, with statistics, calibration chart and model card."""

import argparse
import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors.torch import save

from ray_ddpo.actors.rewards.aesthetic import load_embedder
from ray_ddpo.common.image_models.aesthetic_head import read_head
from ray_ddpo.common.recipe.tables import RuntimeTable
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.runtime import settle
from ray_ddpo.common.trajectory import DTYPES
from ray_ddpo.deploy.commands.fit_aesthetic.calibration import calibration_chart
from ray_ddpo.deploy.commands.fit_aesthetic.card import in_words, model_card, versions
from ray_ddpo.learner.aesthetic_head.agreement import agreement
from ray_ddpo.learner.aesthetic_head.embedding import Embedder, embed_images_of
from ray_ddpo.learner.aesthetic_head.embedding_store import ClipIdentity, EmbeddingStore
from ray_ddpo.learner.aesthetic_head.fit import FittedHead, HeadKind, Rated, Training, fit_head
from ray_ddpo.learner.aesthetic_head.splits import SplitPlan, assign_splits, check_sizes
from ray_ddpo.learner.aesthetic_head.table import SPLITS, RatedImages, read_table

HEAD, CARD, METRICS, BROKEN = "head.safetensors", "README.md", "metrics.json", "broken.csv"
PREDICTIONS, CALIBRATION = "predictions.parquet", "calibration.png"
CLIP_FILES = ("*.safetensors", "pytorch_model*.bin")  # transformers reads the first kind that exists


@dataclass(frozen=True)
class FitRequest:
    """Options of `ddpo fit-aesthetic`."""

    images: Path
    table: Path
    output: Path
    clip: str
    head: HeadKind
    training: Training
    splits: SplitPlan
    table_format: str | None = None  # of the table; None: detect it
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # CLIP's, as in the reward
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    embedding_batch_size: int = 32


def request_of(options: argparse.Namespace) -> FitRequest:
    """Convert command-line options. Raise ValueError if a number is too small, or the output is not on this machine."""
    if "://" in options.output:
        raise ValueError(f"--output is {options.output!r}: it must be a folder of this machine")
    for name in ("epochs", "batch_size", "embedding_batch_size", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be 1 or more")
    return FitRequest(
        images=Path(options.images).expanduser(),
        table=Path(options.table).expanduser(),
        output=Path(options.output).expanduser(),
        clip=options.clip,
        head=options.head,
        training=Training(options.seed, options.epochs, options.batch_size),
        splits=SplitPlan(
            options.seed, options.validation, options.test, Path(options.split_file) if options.split_file else None
        ),
        table_format=options.format,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        embedding_batch_size=options.embedding_batch_size,
    )


@dataclass(frozen=True)
class Usable:
    """The images with an embedding, in the table's order."""

    images: RatedImages
    splits: np.ndarray  # [N] of names
    embeddings: torch.Tensor  # [N D]

    def of(self, split: str, device: str) -> Rated:
        chosen = self.splits == split
        ratings = torch.from_numpy(self.images.ratings[chosen])
        return Rated(self.embeddings[torch.from_numpy(chosen)].to(device), ratings.to(device))


def fit_aesthetic(request: FitRequest) -> str:
    """Fit a head, write the output folder, and return a summary for the terminal.

    Raises:
        ValueError: table, images, CLIP or shares of the split cannot be used.
    """
    if not request.images.is_dir():
        raise ValueError(f"the folder of images {request.images} is not there")
    device = settle(RuntimeTable(device=request.device, threads=request.threads))
    images = read_table(request.table, request.table_format)
    splits = assign_splits(images, request.splits)
    check_sizes(splits)
    embedder, clip = _load_clip(request, device)
    storage = Storage(request.output)
    store = EmbeddingStore.open(storage.folder("embeddings"), clip)
    broken = embed_images_of(request.images, images.paths, embedder, store)
    _write_broken(storage, broken)
    usable = _usable(images, splits, store)
    check_sizes(usable.splits.tolist())
    fitted = fit_head(request.head, usable.of("train", device), usable.of("validation", device), request.training)
    storage.write(HEAD, _head_bytes(fitted, clip, request))
    predicted = read_head(request.output / HEAD)(usable.embeddings).numpy()
    stats = _stats(request, clip, fitted, usable, predicted) | {"broken": len(broken)}
    _write_results(storage, usable, predicted, stats)
    return in_words(stats, request.output.absolute())


def _load_clip(request: FitRequest, device: str) -> tuple[Embedder, ClipIdentity]:
    """Load CLIP, and identify it by its files, for the store of embeddings."""
    from transformers import CLIPVisionConfig

    dtype = request.dtype if request.dtype != "auto" else "float16" if device == "cuda" else "float32"
    embed, dimension = load_embedder(request.clip, device, DTYPES[dtype])
    folder = _clip_folder(request.clip)
    name = str(folder.absolute()) if Path(request.clip).expanduser().is_dir() else request.clip
    side: Any = CLIPVisionConfig.from_pretrained(folder).image_size
    identity = ClipIdentity(name, f"{_weights_fingerprint(folder)}-{dtype}", dimension)
    return Embedder(embed, side, device, request.embedding_batch_size), identity


def _clip_folder(clip: str) -> Path:
    """Return the local folder of a CLIP that was just loaded."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(clip).expanduser()
    if folder.is_dir():
        return folder
    config = try_to_load_from_cache(clip, "config.json")
    assert isinstance(config, str), "a model loaded from the hub is in its cache"
    return Path(config).parent


def _weights_fingerprint(folder: Path) -> str:
    files = next((found for kind in CLIP_FILES if (found := sorted(folder.glob(kind)))), [])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _usable(images: RatedImages, splits: tuple[str, ...], store: EmbeddingStore) -> Usable:
    """Select the images that have an embedding."""
    rows = [
        (row, known.embedding)
        for row, path in enumerate(images.paths)
        if (known := store.known[path]).embedding is not None
    ]
    kept = [row for row, _ in rows]
    there = RatedImages(tuple(images.paths[row] for row in kept), images.ratings[kept])
    embeddings = torch.from_numpy(np.stack([embedding for _, embedding in rows if embedding is not None]))
    return Usable(there, np.array([splits[row] for row in kept]), embeddings)


def _head_bytes(fitted: FittedHead, clip: ClipIdentity, request: FitRequest) -> bytes:
    """Serialize the head with its origin."""
    # One metadata key, because safetensors writes several in random order, and a refit must give the same bytes.
    origin = {
        "clip": clip.name,
        "clip_fingerprint": clip.fingerprint,
        "head": request.head,
        "seed": request.training.seed,
    }
    return save(fitted.weights, {"fitted": json.dumps(origin)})


def _stats(
    request: FitRequest, clip: ClipIdentity, fitted: FittedHead, usable: Usable, predicted: np.ndarray
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    ratings = usable.images.ratings
    by_split = {
        split: agreement(predicted[usable.splits == split], ratings[usable.splits == split]) for split in SPLITS
    }
    return {
        "head": request.head,
        "clip": clip.name,
        "clip_fingerprint": clip.fingerprint,
        "table": request.table.name,
        "seed": request.training.seed,
        "images": len(ratings),
        "ratings": {
            "mean": float(ratings.mean()),
            "std": float(ratings.std()),
            "min": float(ratings.min()),
            "max": float(ratings.max()),
        },
        "splits": by_split,
        "chosen": fitted.chosen,
        "tried": fitted.tried,
        "versions": versions(),
    }


def _write_results(storage: Storage, usable: Usable, predicted: np.ndarray, stats: dict[str, Any]) -> None:
    """Write predictions, calibration chart, metrics and model card."""
    ratings, splits = usable.images.ratings, usable.splits
    columns = {"path": usable.images.paths, "split": splits.tolist(), "rating": ratings, "predicted": predicted}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    storage.write(PREDICTIONS, buffer.getvalue())
    held_out = "test" if (splits == "test").sum() > 1 else "validation"
    storage.write(CALIBRATION, calibration_chart(predicted[splits == held_out], ratings[splits == held_out], held_out))
    storage.write(METRICS, (json.dumps(stats, indent=1) + "\n").encode())
    storage.write(CARD, model_card(stats).encode())


def _write_broken(storage: Storage, broken: dict[str, str]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *broken.items()])
    storage.write(BROKEN, text.getvalue().encode())
