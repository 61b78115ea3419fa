"""ddpo replay: sample a round again from the checkpointed weights, and compare it with the ledger image by image."""

from dataclasses import dataclass
from typing import Any

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.actors.task_care import Care
from ray_ddpo.common.base_parts import BASE
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.prompts import Prompt, metadata_as_json
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.deploy.commands.weights.given_base import refuse_another_base
from ray_ddpo.deploy.driver.components import SAMPLING, build_components
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.learner.checkpoints.checkpoint import (
    damaged_checkpoints,
    intact_checkpoints,
    load_weights,
    policy_versions,
)

Row = dict[str, Any]  # of the ledger


@dataclass(frozen=True)
class Replay:
    """Result of a replay: the differences of each image from the ledger."""

    round_index: int
    policy_version: int
    images: int
    differences: dict[int, list[str]]  # by the image's number in the round

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def text(self) -> str:
        lines = [f"image {image}: {'; '.join(texts)}" for image, texts in sorted(self.differences.items())]
        sampled = f"round {self.round_index}, re-sampled with policy version {self.policy_version}"
        count = len(self.differences)
        summary = f"all {self.images} images are equal" if self.equal else f"{count} of {self.images} images differ"
        return "\n".join([*lines, f"{sampled}: {summary}"])


def replay(run: str, round_index: int, overrides: list[str]) -> Replay:
    """Sample a round of a run again, and compare the images with the ledger.

    Raises:
        ValueError: there is no such run or no such round in its ledger, or the weights of the round were not kept.
    """
    folder = RunFolder(run)
    recipe = folder.load_recipe(overrides)
    ledger = Ledger(folder.storage, recipe.rollouts)
    rows = ledger.read(round_index).to_pylist()
    stood_on = BASE.validate_python(ledger.about(round_index).get("base") or folder.base())
    version = rows[0]["policy_version"]
    weights = kept_weights(folder.checkpoints, round_index, version)
    parts = build_components(recipe, used=SAMPLING)
    scheduled = round_tasks(recipe, round_index, parts.prompts.load())
    differences: dict[int, list[str]] = {}
    for image, text in [*_against_schedule(rows, scheduled), *_against_weights(rows, weights)]:
        differences.setdefault(image, []).append(text)
    sampler = Sampler(parts.policy, recipe.sampling, recipe.runtime)
    refuse_another_base(folder, stood_on, sampler.loaded_parts() | prompts_base(parts), overrides)
    sampled: list[str] = []
    for task in tasks_of(rows):
        report, _, _ = sampler.sample(task, weights, Care(not_decoded=without_image(rows, task.index)))
        assert report is not None, "no task of this sampler is canceled"
        sampled += report.image_fingerprints
    for row, fingerprint in zip(rows, sampled, strict=True):
        if row["image_fingerprint"] != fingerprint:
            text = f"the ledger has {_short(row['image_fingerprint'])}, and re-sampled it is {_short(fingerprint)}"
            differences.setdefault(row["image"], []).append(f"{text} ({row['prompt']!r}, seed {row['seed']})")
    return Replay(round_index, version, len(rows), differences)


def kept_weights(checkpoints: Storage, round_index: int, version: int) -> PolicyWeights:
    """Load a policy version's weights from the newest checkpoint with them.

    Raise ValueError if no checkpoint has them.
    """
    intact = list(intact_checkpoints(checkpoints))
    for checkpoint in intact:
        if version in policy_versions(checkpoint):
            return next(weights for weights in load_weights(checkpoint) if weights.policy_version == version)
    held = {checkpoint.name: policy_versions(checkpoint) for checkpoint in intact}
    there = [f"{name} has {versions}" for name, versions in held.items()] or ["there are none"]
    there += [f"{name} is damaged" for name in damaged_checkpoints(checkpoints)]
    raise ValueError(
        f"round {round_index} was sampled with policy version {version}, which no checkpoint in {checkpoints.location} "
        f"holds ({'; '.join(there)}): a run with a smaller checkpoint.every and a larger checkpoint.keep keeps more of "
        "them"
    )


def tasks_of(rows: list[Row]) -> list[Task]:
    """Rebuild a round's tasks from its ledger rows, in order."""
    tasks = []
    for index in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == index]
        prompts, seeds = tuple(Prompt(row["prompt"]) for row in of_task), tuple(row["seed"] for row in of_task)
        tasks.append(Task(of_task[0]["round"], index, of_task[0]["policy_version"], prompts, seeds))
    return tasks


def without_image(rows: list[Row], task: int) -> tuple[int, ...]:
    """Return the task's rows without an image: decoding them ends the process, so they were dropped."""
    of_task = [row for row in rows if row["task"] == task]
    return tuple(number for number, row in enumerate(of_task) if row["image_fingerprint"] == "")


def _against_schedule(rows: list[Row], scheduled: list[Task]) -> list[tuple[int, str]]:
    """Compare the ledger with the tasks that the recipe schedules; return differences by image."""
    expected = [
        {
            "task": task.index,
            "prompt": prompt.text,
            "seed": seed,
            "policy_version": task.policy_version,
            "metadata": metadata,
        }
        for task in scheduled
        for prompt, seed, metadata in zip(task.prompts, task.seeds, metadata_as_json(task.prompts), strict=True)
    ]
    if len(expected) != len(rows):
        raise ValueError(
            f"the ledger has {len(rows)} images of round {rows[0]['round']}, and its recipe {len(expected)}"
        )
    return [
        (row["image"], f"{name} is {row[name]!r} in the ledger, and {value!r} by the recipe")
        for row, wanted in zip(rows, expected, strict=True)
        for name, value in wanted.items()
        if name in row and row[name] != value  # a ledger without metadata has no such column
    ]


def _against_weights(rows: list[Row], weights: PolicyWeights) -> list[tuple[int, str]]:
    """Compare the ledger's fingerprints with those of the checkpoint's weights; return differences by image."""
    return [
        (
            row["image"],
            f"sampled with weights {_short(row['fingerprint'])}, the checkpoint's are {_short(weights.fingerprint)}",
        )
        for row in rows
        if row["fingerprint"] != weights.fingerprint
    ]


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "no fingerprint"
