"""The ledger: `rollouts/round=000012/images.parquet`, one row an image, written when its round is learned from.

The round stands in the folder's name alone, as other programs read it: pandas, DuckDB, pyarrow.
"""

import io
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import UInt8

from ray_ddpo.common.prompts import metadata_as_json
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.png import png
from ray_ddpo.common.run_storage.reading import read_parquet
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.run_storage.unwritten import Unwritten
from ray_ddpo.common.trajectory import Rollout, TaskReport, TrainBatch

FOLDER = "rollouts"
FILE = "images.parquet"
ABOUT = "ray_ddpo"
ROUND_FOLDER = re.compile(r"round=(\d+)")
OF_ITS_GROUP = "an image of its group was dropped"
COLUMNS = {
    "task": pa.int32(),
    "image": pa.int32(),  # in the round, in task order
    "prompt": pa.string(),
    "seed": pa.int64(),
    "policy_version": pa.int64(),
    "fingerprint": pa.string(),  # of the weights that sampled it
    "image_fingerprint": pa.string(),  # of its pixels
    "sampled_by": pa.string(),
    "sampled_on": pa.string(),  # processor or GPU, and library versions
    "scored_on": pa.string(),  # the same of reward workers; of several machines, one after the other
    "seconds": pa.float64(),  # of sampling: its share of its task's
    "dropped": pa.string(),  # why it was not learned from; null: it was
    "reward": pa.float64(),  # weighted sum of the columns reward/<name>; null: it could not be scored
    "advantage": pa.float64(),  # null: it was not learned from
}


NOT_SAMPLED = ("scored_on", "dropped", "reward", "advantage")


class Ledger:
    """Writes and reads a run's `rollouts/`. A round's file is whole or absent; writing a round again replaces it."""

    def __init__(
        self,
        storage: Storage,
        table: RolloutsTable,
        about: dict[str, Any] | None = None,
        unwritten: Unwritten | None = None,
    ) -> None:
        """Open a run's ledger.

        Args:
            about: what a round's file says of all its rows, in the parquet schema's metadata under ABOUT.
            unwritten: keeps what the storage refuses for the moment; without it, that is a StorageError.
        """
        self._storage = storage.folder(FOLDER)
        self._table = table
        self._about = about or {}
        self._write = unwritten.write if unwritten else Storage.write

    def wants_images(self, round: int) -> bool:
        """Whether this round's rows are to hold their images."""
        return self._table.keep and self._table.images_every > 0 and round % self._table.images_every == 0

    def write_round(
        self,
        batch: TrainBatch,
        rollouts: list[Rollout],
        weights: dict[str, float],
        images: list[UInt8[np.ndarray, "B H W 3"]] | None = None,
    ) -> None:
        """Write what a round has learned from, if the recipe keeps rollouts; `images` are a task's each."""
        if not self._table.keep:
            return
        columns = {**_drawn([rollout.report for rollout in rollouts]), **_scored(rollouts, weights)}
        count = len(columns["seed"])
        assert count == len(batch.advantages), "a round has one advantage an image"
        reasons = _reasons(rollouts)
        columns["dropped"] = [
            reasons.get(image, OF_ITS_GROUP if image in batch.dropped else None) for image in range(count)
        ]
        columns["advantage"] = batch.advantages
        columns |= {f"joined/{name}": values for name, values in batch.joined_from.items()}
        types = COLUMNS | {name: pa.float64() for name in columns if name.startswith(("reward/", "joined/"))}
        prompts = [prompt for rollout in rollouts for prompt in rollout.report.task.prompts]
        if any(prompt.metadata for prompt in prompts):
            columns["metadata"], types["metadata"] = metadata_as_json(prompts), pa.string()
        table = pa.table({name: pa.array(columns[name], kind, from_pandas=True) for name, kind in types.items()})
        if images is not None and self.wants_images(batch.round):
            table = table.append_column("pixels", pa.array([png(image) for task in images for image in task]))
        table = table.replace_schema_metadata({ABOUT: json.dumps(self._about)})
        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        self._write(self._storage, f"{_folder(batch.round)}/{FILE}", buffer.getvalue())

    def rounds(self) -> list[int]:
        """The rounds that are there, in order."""
        found = [ROUND_FOLDER.fullmatch(name) for name in self._storage.names()]
        numbers = [int(match[1]) for match in found if match]
        return sorted(number for number in numbers if self._storage.exists(f"{_folder(number)}/{FILE}"))

    def cut(self, first_round: int) -> None:
        """Remove `first_round` and what came after it: a resumed run does those again."""
        for name in self._storage.names():
            match = ROUND_FOLDER.fullmatch(name)
            if match and int(match[1]) >= first_round:
                self._storage.remove(name)

    def read(self, round: int, columns: tuple[str, ...] = tuple(COLUMNS)) -> pa.Table:
        """A round's rows, in task order. ValueError: the ledger does not have it, or it lacks one of `columns`."""
        try:
            table = read_parquet(self._storage, f"{_folder(round)}/{FILE}", columns)
        except FileNotFoundError as error:
            there = self.rounds()
            has = f"it has {len(there)} rounds, {there[0]} to {there[-1]}" if there else "it is empty"
            raise ValueError(f"the ledger {self._storage.location} has no round {round}: {has}") from error
        return table.add_column(0, "round", pa.array([round] * len(table), pa.int32()))

    def about(self, round: int) -> dict[str, Any]:
        """Return what a round's file says of all its rows. ValueError: the ledger does not have the round."""
        return json.loads((self.read(round).schema.metadata or {}).get(ABOUT.encode(), b"{}"))


def _folder(round: int) -> str:
    return f"round={round:06d}"


def _drawn(reports: list[TaskReport]) -> dict[str, Any]:
    """What the samplers have said, an entry an image."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS if name not in NOT_SAMPLED}
    for report in reports:
        task, images = report.task, len(report.task.seeds)
        columns["prompt"] += [prompt.text for prompt in task.prompts]
        columns["seed"] += task.seeds
        columns["image_fingerprint"] += report.image_fingerprints or [None] * images
        of_task = {
            "task": task.index,
            "policy_version": task.policy_version,
            "fingerprint": report.fingerprint,
            "sampled_by": report.sampled_by,
            "sampled_on": str(report.machine) if report.machine else None,
            "seconds": report.seconds / images,
        }
        for name, value in of_task.items():
            columns[name] += [value] * images
    columns["image"] = list(range(len(columns["seed"])))
    return columns


def _scored(rollouts: list[Rollout], weights: dict[str, float]) -> dict[str, Any]:
    rewards = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]) for name in weights}
    parts = [weight * rewards[name].astype(np.float64) for name, weight in weights.items()]
    scored_on = [
        "; ".join(sorted(map(str, rollout.scores.machines))) or None
        for rollout in rollouts
        for _ in rollout.report.task.seeds
    ]
    return {
        "scored_on": scored_on,
        "reward": np.sum(parts, axis=0),
        **{f"reward/{name}": values for name, values in rewards.items()},
    }


def _reasons(rollouts: list[Rollout]) -> dict[int, str]:
    """Why images could not be scored, by their number in the round."""
    found, first = {}, 0
    for rollout in rollouts:
        found |= {first + row: reason for row, reason in rollout.scores.dropped.items()}
        first += len(rollout.report.task.seeds)
    return found
