"""ddpo fit-aesthetic: fit an aesthetic head on rated images, with statistics, calibration chart and model card."""

import argparse
import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

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
from ray_ddpo.learner.aesthetic_head.fit import Rated, Training, fit_head
from ray_ddpo.learner.aesthetic_head.splits import SplitPlan, assign_splits, check_sizes
from ray_ddpo.learner.aesthetic_head.table import SPLITS, read_table

HEAD, CARD, METRICS, BROKEN = "head.safetensors", "README.md", "metrics.json", "broken.csv"
PREDICTIONS, CALIBRATION = "predictions.parquet", "calibration.png"
CLIP_FILES = ("*.safetensors", "pytorch_model*.bin")  # transformers reads the first kind that exists


def fit_aesthetic(options: argparse.Namespace) -> str:
    """Fit a head as the command line says, write the output folder, and return a summary for the terminal.

    Raises:
        ValueError: a number is too small, or output, table, images, CLIP or shares of the split cannot be used.
    """
    _check(options)
    table, output = Path(os.path.expanduser(options.table)), Path(os.path.expanduser(options.output))
    device = settle(RuntimeTable(device=options.device, threads=options.threads))
    images = read_table(table, options.format)
    test_list = Path(options.split_file) if options.split_file else None
    split_names = assign_splits(images, SplitPlan(options.seed, options.validation, options.test, test_list))
    check_sizes(split_names)
    storage = Storage(output)
    store, broken = _embed(options, images.paths, device, storage)
    known = [store.known[path].embedding for path in images.paths]
    usable = [row for row, embedding in enumerate(known) if embedding is not None]
    embeddings = torch.from_numpy(np.stack([embedding for embedding in known if embedding is not None]))
    splits, ratings = np.array(split_names)[usable], images.ratings[usable]
    check_sizes(splits.tolist())

    def rated(split: str) -> Rated:
        chosen = splits == split
        return Rated(embeddings[torch.from_numpy(chosen)].to(device), torch.from_numpy(ratings[chosen]).to(device))

    training = Training(options.seed, options.epochs, options.batch_size)
    fitted = fit_head(options.head, rated("train"), rated("validation"), training)
    clip = {"clip": store.clip.name, "clip_fingerprint": store.clip.fingerprint}
    origin = json.dumps({**clip, "head": options.head, "seed": options.seed})
    # One metadata key, because safetensors writes several in random order, and a refit must give the same bytes.
    storage.write(HEAD, save(fitted.weights, {"fitted": origin}))
    predicted = read_head(output / HEAD)(embeddings).numpy()
    stats = {
        "head": options.head,
        **clip,
        "table": table.name,
        "seed": options.seed,
        "images": len(ratings),
        "ratings": {name: float(getattr(ratings, name)()) for name in ("mean", "std", "min", "max")},
        "splits": {split: agreement(predicted[splits == split], ratings[splits == split]) for split in SPLITS},
        "chosen": fitted.chosen,
        "tried": fitted.tried,
        "versions": versions(),
        "broken": len(broken),
    }
    columns = {"path": [images.paths[row] for row in usable], "split": splits.tolist()}
    _write_results(storage, {**columns, "rating": ratings, "predicted": predicted}, stats)
    return in_words(stats, output.absolute())


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are wrong by themselves."""
    if "://" in options.output:
        raise ValueError(f"--output is {options.output!r}: it must be a folder of this machine")
    for name in ("epochs", "batch_size", "embedding_batch_size", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be 1 or more")
    if not Path(os.path.expanduser(options.images)).is_dir():
        raise ValueError(f"the folder of images {Path(os.path.expanduser(options.images))} is not there")


def _write_results(storage: Storage, columns: dict[str, Any], stats: dict[str, Any]) -> None:
    """Write predictions, calibration chart, metrics and model card."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    storage.write(PREDICTIONS, buffer.getvalue())
    held_out = "test" if columns["split"].count("test") > 1 else "validation"
    rows = np.array(columns["split"]) == held_out
    storage.write(CALIBRATION, calibration_chart(columns["predicted"][rows], columns["rating"][rows], held_out))
    storage.write(METRICS, (json.dumps(stats, indent=1) + "\n").encode())
    storage.write(CARD, model_card(stats).encode())


def _embed(
    options: argparse.Namespace, paths: tuple[str, ...], device: str, storage: Storage
) -> tuple[EmbeddingStore, dict[str, str]]:
    """Embed the images, and list the broken ones in a file. Return the store, and the reason of each broken image."""
    embedder, clip = _load_clip(options, device)
    store = EmbeddingStore.open(storage.folder("embeddings"), clip)
    broken = embed_images_of(Path(os.path.expanduser(options.images)), paths, embedder, store)
    listed = io.StringIO()
    csv.writer(listed, lineterminator="\n").writerows([("path", "reason"), *broken.items()])
    storage.write(BROKEN, listed.getvalue().encode())
    return store, broken


def _load_clip(options: argparse.Namespace, device: str) -> tuple[Embedder, ClipIdentity]:
    """Load CLIP, and identify it by its files, for the store of embeddings."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import CLIPVisionConfig

    dtype = options.dtype if options.dtype != "auto" else "float16" if device == "cuda" else "float32"
    embed, dimension = load_embedder(options.clip, device, DTYPES[dtype])
    name, folder = options.clip, Path(os.path.expanduser(options.clip))
    if folder.is_dir():
        name = str(folder.absolute())
    else:
        config = try_to_load_from_cache(options.clip, "config.json")
        assert isinstance(config, str), "a model loaded from the hub is in its cache"
        folder = Path(config).parent
    digest = hashlib.sha256()
    for file in next((found for kind in CLIP_FILES if (found := sorted(folder.glob(kind)))), []):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    side: Any = CLIPVisionConfig.from_pretrained(folder).image_size
    identity = ClipIdentity(name, f"{digest.hexdigest()[:16]}-{dtype}", dimension)
    return Embedder(embed, side, device, options.embedding_batch_size), identity
