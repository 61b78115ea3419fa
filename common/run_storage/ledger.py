"""The ledger: `rollouts/round=000012/images.parquet`, one row per image, written when its round is trained on.

The round is stored in the folder's name only, as pandas, DuckDB and pyarrow read it.
"""

import io
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from ray_ddpo.common.clips import Pixels, posters
from ray_ddpo.common.prompts import metadata_as_json
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.png import png
from ray_ddpo.common.run_storage.reading import read_parquet
from ray_ddpo.common.run_storage.storage import Storage, Unwritten
from ray_ddpo.common.trajectory import Rollout, TaskReport, TrainBatch, path_kls

FOLDER = "rollouts"
FILE = "images.parquet"
ABOUT = "ray_ddpo"
ROUND_FOLDER = re.compile(r"round=(\d+)")
OF_ITS_GROUP = "an image of its group was dropped"
COLUMNS = {
    "task": pa.int32(),
    "image": pa.int32(),  # index in the round, in task order
    "prompt": pa.string(),
    "seed": pa.int64(),
    "policy_version": pa.int64(),
    "fingerprint": pa.string(),  # of the weights that sampled it
    "image_fingerprint": pa.string(),  # of the pixels, of a clip's in all frames
    "sampled_by": pa.string(),
    "sampled_on": pa.string(),  # processor or GPU, and library versions
    "scored_on": pa.string(),  # the reward workers' machines, separated by semicolons
    "seconds": pa.float64(),  # its share of the task's sampling time
    "dropped": pa.string(),  # why the image was not trained on; null if it was
    "reward": pa.float64(),  # weighted sum of the columns reward/<name>; null if it could not be scored
    "advantage": pa.float64(),  # null if the image was not trained on
}
NOT_SAMPLED = ("scored_on", "dropped", "reward", "advantage")


class Ledger:
    """Writer and reader of a run's `rollouts/`. A round's file is complete or absent; writing it again replaces it."""

    def __init__(
        self,
        storage: Storage,
        table: RolloutsTable,
        about: dict[str, Any] | None = None,
        unwritten: Unwritten | None = None,
    ) -> None:
        """Open a run's ledger.

        Args:
            storage: the run's folder.
            table: the recipe's `[rollouts]`.
            about: facts about all rows of a file, stored in the parquet schema's metadata under ABOUT.
            unwritten: keeps writes that the storage refuses for the moment. Without it, these raise StorageError.
        """
        self._storage = storage.folder(FOLDER)
        self._table = table
        self._about = about or {}
        self._write = unwritten.write if unwritten else Storage.write

    def wants_images(self, round_index: int) -> bool:
        """Return whether this round's rows should contain their images."""
        return self._table.keep and self._table.images_every > 0 and round_index % self._table.images_every == 0

    def write_round(
        self,
        batch: TrainBatch,
        rollouts: list[Rollout],
        weights: dict[str, float],
        images: list[Pixels] | None = None,
    ) -> None:
        """Write a round's rows, if the recipe keeps them, with images and each reward's weight by name.

        The image of a clip is its poster. Its fingerprint is of all frames.
        """
        if not self._table.keep:
            return
        columns = {**_sampling_columns([each.report for each in rollouts]), **_reward_columns(rollouts, weights)}
        count = len(columns["seed"])
        assert count == len(batch.advantages), "a round has one advantage per image"
        reasons = _reasons(rollouts)
        reasons = {image: OF_ITS_GROUP for image in batch.dropped} | reasons
        columns["dropped"] = [reasons.get(image) for image in range(count)]
        columns["advantage"] = batch.advantages
        columns |= {f"joined/{name}": values for name, values in batch.aggregated_rewards.items()}
        types = COLUMNS | {name: pa.float64() for name in columns if name.startswith(("reward/", "joined/"))}
        prompts = [prompt for rollout in rollouts for prompt in rollout.report.task.prompts]
        if any(each.report.task.prefix_seeds for each in rollouts):
            columns["prefix_seed"] = [seed for each in rollouts for seed in each.report.task.prefix_seeds or ()]
            types["prefix_seed"] = pa.int64()  # of the noise that the image shares with its group
        if len(path_kl := path_kls(rollouts)):
            columns["path_kl_nats"], types["path_kl_nats"] = path_kl, pa.float64()
        if any(prompt.metadata for prompt in prompts):
            columns["metadata"], types["metadata"] = metadata_as_json(prompts), pa.string()
        table = pa.table({name: pa.array(columns[name], kind, from_pandas=True) for name, kind in types.items()})
        if images is not None and self.wants_images(batch.round):
            table = table.append_column("pixels", pa.array([png(image) for task in images for image in posters(task)]))
        table = table.replace_schema_metadata({ABOUT: json.dumps(self._about)})
        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        self._write(self._storage, f"{_folder(batch.round)}/{FILE}", buffer.getvalue())

    def rounds(self) -> list[int]:
        """Return the stored rounds, in order."""
        found = [ROUND_FOLDER.fullmatch(name) for name in self._storage.names()]
        numbers = [int(match[1]) for match in found if match]
        return sorted(number for number in numbers if self._storage.exists(f"{_folder(number)}/{FILE}"))

    def cut(self, first_round: int) -> None:
        """Remove `first_round` and later rounds, which a resumed run does again."""
        for name in self._storage.names():
            match = ROUND_FOLDER.fullmatch(name)
            if match and int(match[1]) >= first_round:
                self._storage.remove(name)

    def read(self, round_index: int, columns: tuple[str, ...] = tuple(COLUMNS)) -> pa.Table:
        """Return a round's rows, in task order.

        Raises:
            ValueError: The ledger lacks the round, or the round lacks one of `columns`.
        """
        try:
            table = read_parquet(self._storage, f"{_folder(round_index)}/{FILE}", columns)
        except FileNotFoundError as error:
            there = self.rounds()
            has = f"it has {len(there)} rounds, {there[0]} to {there[-1]}" if there else "it is empty"
            raise ValueError(f"the ledger {self._storage.location} has no round {round_index}: {has}") from error
        return table.add_column(0, "round", pa.array([round_index] * len(table), pa.int32()))

    def about(self, round_index: int) -> dict[str, Any]:
        """Return the facts about all rows of a round's file. Raise ValueError if the ledger lacks the round."""
        return json.loads((self.read(round_index).schema.metadata or {}).get(ABOUT.encode(), b"{}"))


def _folder(round_index: int) -> str:
    return f"round={round_index:06d}"


def _sampling_columns(reports: list[TaskReport]) -> dict[str, Any]:
    """Return the columns that samplers report, one entry per image."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS if name not in NOT_SAMPLED}
    for report in reports:
        task, images = report.task, len(report.task.seeds)
        columns["prompt"] += [prompt.text for prompt in task.prompts]
        columns["seed"] += task.seeds
        columns["image_fingerprint"] += report.image_fingerprints or [None] * images
        columns["task"] += [task.index] * images
        columns["policy_version"] += [task.policy_version] * images
        columns["fingerprint"] += [report.fingerprint] * images
        columns["sampled_by"] += [report.sampled_by] * images
        columns["sampled_on"] += [str(report.machine) if report.machine else None] * images
        columns["seconds"] += [report.seconds / images] * images
    columns["image"] = list(range(len(columns["seed"])))
    return columns


def _reward_columns(rollouts: list[Rollout], weights: dict[str, float]) -> dict[str, Any]:
    """Return the columns that reward workers report, one entry per image."""
    rewards = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]) for name in weights}
    parts = [weight * rewards[name].astype(np.float64) for name, weight in weights.items()]
    scored_on: list[str | None] = []
    for rollout in rollouts:
        machines = "; ".join(sorted(map(str, rollout.scores.machines))) or None
        scored_on += [machines] * len(rollout.report.task.seeds)
    columns = {f"reward/{name}": values for name, values in rewards.items()}
    return {"scored_on": scored_on, "reward": np.sum(parts, axis=0), **columns}


def _reasons(rollouts: list[Rollout]) -> dict[int, str]:
    """Return why images could not be scored, by their index in the round."""
    found, first = {}, 0
    for rollout in rollouts:
        found |= {first + row: reason for row, reason in rollout.scores.dropped.items()}
        first += len(rollout.report.task.seeds)
    return found
