"""Results of evaluations: `evaluations.jsonl`, one object per version, and `evaluations/version=000012/images.parquet`."""

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from jaxtyping import UInt8

from ray_ddpo.common.prompts import Prompt, metadata_as_json
from ray_ddpo.common.reading import parquet_table, reading
from ray_ddpo.common.run_storage.png import from_png, png
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.storage import Storage, Unwritten

FIGURES = "evaluations.jsonl"
FOLDER = "evaluations"
FILE = "images.parquet"
REPORTED = ("policy_version", "scores", "alarms", "image_statistics")  # keys that a report needs


@dataclass(frozen=True)
class EvaluatedImages:
    """Images of one version, or of its moving average, with their scores."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    scores: dict[str, np.ndarray]  # by reward and scorer, [N], NaN for images without a score
    pixels: UInt8[np.ndarray, "N H W 3"]
    without_image: frozenset[int] = frozenset()  # rows without an image, whose pixels are black


def images_table(variant: str, evaluated: EvaluatedImages, images: int) -> pa.Table:
    """Return a table with one row per image, of which the first `images` rows contain the image.

    Args:
        variant: the weights that the images were sampled with: "current" or the moving average's name.
        evaluated: the images.
        images: how many rows contain their image.
    """
    count = len(evaluated.seeds)
    shown = [png(pixels) if image < images else None for image, pixels in enumerate(evaluated.pixels)]
    columns = {
        "variant": pa.array([variant] * count),
        "image": pa.array(range(count), pa.int32()),
        "prompt": pa.array([prompt.text for prompt in evaluated.prompts]),
        "seed": pa.array(evaluated.seeds, pa.int64()),
        "pixels": pa.array(shown, pa.binary()),
    }
    if any(prompt.metadata for prompt in evaluated.prompts):
        columns["metadata"] = pa.array(metadata_as_json(evaluated.prompts), pa.string())
    scores = {
        f"score/{name}": pa.array(values.astype(np.float64), from_pandas=True)
        for name, values in evaluated.scores.items()
    }
    return pa.table(columns | scores)


class EvaluationLog:
    """Writer and reader of evaluations. A version exists once its line does, which is written last."""

    def __init__(self, storage: Storage, unwritten: Unwritten | None = None) -> None:
        """Open the log.

        Args:
            storage: the run's folder.
            unwritten: keeps writes that the storage refuses for the moment.
        """
        self._storage = storage
        self._unwritten = unwritten or Unwritten()

    def figures(self, keys: tuple[str, ...] = ("policy_version",)) -> list[dict[str, Any]]:
        """Return the versions' objects in the order of writing, without an incomplete last line.

        Raises:
            ValueError: A line is damaged, or lacks one of `keys`.
        """
        if not self._storage.exists(FIGURES):
            return []
        return read_json_lines(self._storage, FIGURES, keys)

    def keep(self, figures: list[dict[str, Any]]) -> None:
        """Remove all versions but these."""
        kept = {_folder(each["policy_version"]) for each in figures}
        self._storage.write(FIGURES, "".join(_line(each) for each in figures).encode())
        for name in self._storage.names(FOLDER):
            if name not in kept:
                self._storage.remove(f"{FOLDER}/{name}")

    def write(self, figures: dict[str, Any], variants: dict[str, EvaluatedImages], images: int) -> None:
        """Add a version: its object, and one row per image, of which the first `images` rows contain the image."""
        tables = [images_table(variant, evaluated, images) for variant, evaluated in variants.items()]
        buffer = io.BytesIO()
        parquet.write_table(pa.concat_tables(tables), buffer)
        name = f"{FOLDER}/{_folder(figures['policy_version'])}/{FILE}"
        self._unwritten.write(self._storage, name, buffer.getvalue())
        self._unwritten.append(self._storage, FIGURES, _line(figures).encode())

    def read(self, policy_version: int) -> pa.Table:
        """Return a version's rows, in the order of the evaluation set.

        Raises:
            FileNotFoundError: The version was not evaluated.
        """
        name = f"{FOLDER}/{_folder(policy_version)}/{FILE}"
        data = self._unwritten.read(self._storage, name)
        return parquet_table(data, f"{self._storage.location}/{name}", ("variant", "pixels"))

    def images(self, policy_version: int) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Return the version's stored images, which are the first ones."""
        kept = [data for data in self._current(policy_version)["pixels"].to_pylist() if data is not None]
        with reading(f"{self._storage.location}/{FOLDER}/{_folder(policy_version)}/{FILE}"):
            return [from_png(data) for data in kept]

    def _current(self, policy_version: int) -> pa.Table:
        return self.read(policy_version).filter(compute.field("variant") == "current")

    def scores(self, policy_version: int) -> dict[str, np.ndarray]:
        """Return the scores of the version's images by reward and scorer, NaN for images without a score."""
        rows = self._current(policy_version)
        names = [name for name in rows.column_names if name.startswith("score/")]
        return {name.removeprefix("score/"): rows[name].to_numpy().astype(np.float64) for name in names}


def _folder(policy_version: int) -> str:
    return f"version={policy_version:06d}"


def _line(figures: dict[str, Any]) -> str:
    return json.dumps(_without_nan(figures)) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace non-finite numbers by null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
