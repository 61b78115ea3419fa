"""Embed the images that the store lacks, in full batches, decoded ahead on threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ray_ddpo.learner.aesthetic_head.embedding_store import EmbeddingStore, StoredImage
from ray_ddpo.learner.aesthetic_head.image_files import NOT_THERE, FileState, file_state, read_squared

Embed = Callable[[UInt8[Tensor, "B H W 3"]], Float[Tensor, "B D"]]
Squared = UInt8[np.ndarray, "side side 3"]
DECODERS = 4  # threads
AHEAD = 2  # batches decoded while one is embedded
NAMED = 3  # broken images named in an error


@dataclass(frozen=True)
class Embedder:
    """CLIP's image tower as a function, its device, and the side of its input squares."""

    embed: Embed
    side: int
    device: str
    batch_size: int = 32
    part_batches: int = 32  # batches written as one file


def embed_images_of(folder: Path, paths: Sequence[str], embedder: Embedder, store: EmbeddingStore) -> dict[str, str]:
    """Embed the images of `paths` that the store lacks.

    Batches are cut from the missing images in the order of `paths`, and a part has full batches only. So embeddings
    have the same bits if the run was stopped and resumed.

    Returns:
        The broken images, and why each is.

    Raises:
        ValueError: most images are broken.
    """
    states = {path: file_state(folder / path) for path in paths}
    _refuse_most_broken({path: NOT_THERE for path, state in states.items() if not state.there}, len(paths), folder)
    left = [path for path, state in states.items() if path not in store.known or store.known[path].state != state]
    batches = [left[start : start + embedder.batch_size] for start in range(0, len(left), embedder.batch_size)]
    pending: dict[str, StoredImage] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns) as progress, ThreadPoolExecutor(DECODERS) as pool:
        bar = progress.add_task("embedding", total=len(paths), completed=len(paths) - len(left))
        for number, (batch, images) in enumerate(_decoded_ahead(pool, folder, batches, embedder.side), start=1):
            pending |= _embedded(batch, images, states, embedder)
            progress.advance(bar, len(batch))
            if number % embedder.part_batches == 0 or number == len(batches):
                store.add(pending)
                pending = {}
    broken = {path: reason for path in paths if (reason := store.known[path].broken)}
    _refuse_most_broken(broken, len(paths), folder)
    return broken


def _decoded_ahead(
    pool: ThreadPoolExecutor, folder: Path, batches: Iterable[list[str]], side: int
) -> Iterator[tuple[list[str], list[Squared | str]]]:
    """Yield each batch with its images, or the reasons why there are none, while the next batches are decoded."""
    waiting: deque[tuple[list[str], list[Future[Squared | str]]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(read_squared, folder / path, side) for path in batch]))
        if len(waiting) > AHEAD:
            paths, futures = waiting.popleft()
            yield paths, [future.result() for future in futures]
    for paths, futures in waiting:
        yield paths, [future.result() for future in futures]


def _embedded(
    batch: list[str], images: list[Squared | str], states: dict[str, FileState], embedder: Embedder
) -> dict[str, StoredImage]:
    """Embed a batch. Broken images, and those whose embedding is not finite, are stored with the reason."""
    known = {
        path: StoredImage(states[path], None, reason)
        for path, reason in zip(batch, images, strict=True)
        if isinstance(reason, str)
    }
    good = {path: image for path, image in zip(batch, images, strict=True) if not isinstance(image, str)}
    if good:
        pixels = torch.from_numpy(np.stack(list(good.values()))).to(embedder.device)
        for path, embedding in zip(good, embedder.embed(pixels).float().cpu().numpy(), strict=True):
            finite = bool(np.isfinite(embedding).all())
            known[path] = StoredImage(
                states[path], embedding if finite else None, None if finite else "its embedding is not finite"
            )
    return {path: known[path] for path in batch}


def _refuse_most_broken(broken: dict[str, str], images: int, folder: Path) -> None:
    if 2 * len(broken) > images:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(broken.items())[:NAMED])
        raise ValueError(
            f"{len(broken)} of the table's {images} images in {folder} cannot be used, which is most of them "
            f"({examples}): do the table's paths begin at this folder?"
        )
