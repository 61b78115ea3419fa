"""EvalLog: `evaluations.jsonl` with an entry a policy version, and `evaluations/version=000012/images.parquet`."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from ray_ddpo.common.clips import Clip, Image, poster
from ray_ddpo.common.prompts import metadata_as_json
from ray_ddpo.common.reading import parquet_table, reading
from ray_ddpo.common.run_storage.png import from_png, png
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.storage import Storage, Unwritten
from ray_ddpo.common.video_files import frames_of, mp4
from ray_ddpo.deploy.evaluation.eval_result import EvalResult, LogEntry

ENTRIES = "evaluations.jsonl"
FOLDER = "evaluations"
FILE = "images.parquet"
REPORTED = ("policy_version", "scores", "alarms", "image_statistics")  # keys that the report needs of an entry


def images_table(variant: str, result: EvalResult, num_pixels: int) -> pa.Table:
    """Return a table with one row an image, or a clip with its poster as `pixels`.

    Args:
        variant: the weights that the images were sampled with, for a column of this name.
        result: images and scores.
        num_pixels: the number of images or clips that are kept, the first ones.
    """
    count = len(result.seeds)
    shown = [png(poster(each)) if image < num_pixels else None for image, each in enumerate(result.pixels)]
    columns = {
        "variant": pa.array([variant] * count),
        "image": pa.array(range(count), pa.int32()),
        "prompt": pa.array([prompt.text for prompt in result.prompts]),
        "seed": pa.array(result.seeds, pa.int64()),
        "pixels": pa.array(shown, pa.binary()),
    }
    if (rate := result.frame_rate) is not None:
        clips = [mp4(each, rate) if image < num_pixels else None for image, each in enumerate(result.pixels)]
        columns["clip"] = pa.array(clips, pa.binary())
    if any(prompt.metadata for prompt in result.prompts):
        columns["metadata"] = pa.array(metadata_as_json(result.prompts), pa.string())
    scores = {
        f"score/{name}": pa.array(values.astype(np.float64), from_pandas=True) for name, values in result.scores.items()
    }
    return pa.table(columns | scores)


class EvalLog:
    """Writes and reads a run's evaluations.

    A version counts as evaluated once its entry is there, which is written last.
    """

    def __init__(self, storage: Storage, unwritten: Unwritten | None = None) -> None:
        """Open the log of a run; `unwritten` keeps whatever the storage refuses for the moment."""
        self._storage = storage
        self._unwritten = unwritten or Unwritten()

    def entries(self, keys: tuple[str, ...] = ("policy_version",)) -> list[LogEntry]:
        """Return the entries in the order in which they were written, without a last line that a kill cut off.

        Raises:
            ValueError: a line is damaged, or lacks one of `keys`.
        """
        if not self._storage.exists(ENTRIES):
            return []
        return read_json_lines(self._storage, ENTRIES, keys)

    def keep(self, entries: list[LogEntry]) -> None:
        """Remove every version except these."""
        kept = {_file(each["policy_version"]) for each in entries}
        self._storage.write(ENTRIES, "".join(_line(each) for each in entries).encode())
        for name in self._storage.names(FOLDER):
            if f"{FOLDER}/{name}/{FILE}" not in kept:
                self._storage.remove(f"{FOLDER}/{name}")

    def write(self, entry: LogEntry, variants: dict[str, EvalResult], num_pixels: int) -> None:
        """Add a version: its entry, and a row for each of its images; only the first `num_pixels` rows hold pixels."""
        tables = [images_table(variant, result, num_pixels) for variant, result in variants.items()]
        buffer = io.BytesIO()
        parquet.write_table(pa.concat_tables(tables), buffer)
        self._unwritten.write(self._storage, _file(entry["policy_version"]), buffer.getvalue())
        self._unwritten.append(self._storage, ENTRIES, _line(entry).encode())

    def read(self, policy_version: int) -> pa.Table:
        """Return a version's rows in the order of the evaluation set.

        Raises:
            FileNotFoundError: the version was not evaluated.
        """
        data = self._unwritten.read(self._storage, _file(policy_version))
        return parquet_table(data, f"{self._storage.location}/{_file(policy_version)}", ("variant", "pixels"))

    def images(self, policy_version: int) -> list[Image]:
        """Return a version's images, or posters of clips, that were kept, the first ones."""
        return self._kept(policy_version, "pixels", from_png)

    def clips(self, policy_version: int) -> list[Clip]:
        """Return a version's clips that were kept, as their files have them; none of a family of images."""
        return self._kept(policy_version, "clip", frames_of)

    def _kept(self, policy_version: int, column: str, read: Callable[[bytes], Any]) -> list[Any]:
        rows = self._current(policy_version)
        if column not in rows.column_names:
            return []
        with reading(f"{self._storage.location}/{_file(policy_version)}"):
            return [read(data) for data in rows[column].to_pylist() if data is not None]

    def scores(self, policy_version: int) -> dict[str, np.ndarray]:
        """Return the scores of a version's images by reward and scorer; NaN if an image has no score."""
        rows = self._current(policy_version)
        names = [name for name in rows.column_names if name.startswith("score/")]
        return {name.removeprefix("score/"): rows[name].to_numpy().astype(np.float64) for name in names}

    def _current(self, policy_version: int) -> pa.Table:
        return self.read(policy_version).filter(compute.field("variant") == "current")


def _file(policy_version: int) -> str:
    return f"{FOLDER}/version={policy_version:06d}/{FILE}"


def _line(entry: LogEntry) -> str:
    # A number that is not finite becomes null, because JSON has no NaN.
    return json.dumps(json.loads(json.dumps(entry), parse_constant=lambda _: None)) + "\n"
