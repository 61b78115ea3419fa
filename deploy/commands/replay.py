"""ddpo replay: sample a round again from the checkpointed weights, and compare it with the ledger image by image."""

import json
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.actors.task_care import Care
from ray_ddpo.common.base_parts import BASE
from ray_ddpo.common.policy_weights import PolicyWeights, weights_of
from ray_ddpo.common.prompts import Prompt, metadata_as_json
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.common.trajectory import ImageBatch, TaskReport
from ray_ddpo.deploy.commands.weights.given_base import check_base
from ray_ddpo.deploy.driver.components import SAMPLING, build_components
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.learner.checkpoints.checkpoint import (
    damaged_checkpoints,
    intact_checkpoints,
    load_weights,
    policy_versions,
)

Row = dict[str, Any]  # of the ledger
SCHEDULED = ("task", "prompt", "seed", "policy_version", "metadata", "prefix_seed")  # columns that the recipe decides


def replay(run: str, round_index: int, overrides: list[str]) -> tuple[str, bool]:
    """Sample a round of a run again, and compare the images with the ledger.

    Returns:
        The differences image by image with a summary, for the terminal, and whether all images are equal.

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
    components = build_components(recipe, used=SAMPLING)
    last = rows[-1]["task"] if components.algorithm.refill_attempts else 0  # of a round that may have been refilled
    tasks = range(max(recipe.sampling.batches_per_round, last + 1))
    scheduled = round_tasks(recipe, round_index, components.prompts.load(), tasks)
    differences = list(_against_schedule(rows, scheduled))
    for row in rows:
        if row["fingerprint"] != weights.fingerprint:
            found, wanted = _short(row["fingerprint"]), _short(weights.fingerprint)
            differences.append((row["image"], f"sampled with weights {found}, the checkpoint's are {wanted}"))
    sampler = Sampler(components.policy, recipe.sampling, recipe.runtime, source=components.image_source)
    check_base(folder, sampler.loaded_parts() | prompts_base(components), overrides, stood_on)
    differences += _against_images(rows, sampler, weights, scheduled[0].window)
    by_image: dict[int, list[str]] = {}
    for image, text in differences:
        by_image.setdefault(image, []).append(text)
    lines = [f"image {image}: {'; '.join(texts)}" for image, texts in sorted(by_image.items())]
    equal = f"{len(by_image)} of {len(rows)} images differ" if by_image else f"all {len(rows)} images are equal"
    lines.append(f"round {round_index}, re-sampled with policy version {version}: {equal}")
    return "\n".join(lines), not by_image


def kept_weights(checkpoints: Storage, round_index: int, version: int) -> PolicyWeights:
    """Load a policy version's weights from the newest checkpoint with them.

    Raise ValueError if no checkpoint has them.
    """
    intact = list(intact_checkpoints(checkpoints))
    for checkpoint in intact:
        if version in policy_versions(checkpoint):
            return weights_of(load_weights(checkpoint), version)
    held = {checkpoint.name: policy_versions(checkpoint) for checkpoint in intact}
    there = [f"{name} has {versions}" for name, versions in held.items()] or ["there are none"]
    there += [f"{name} is damaged" for name in damaged_checkpoints(checkpoints)]
    raise ValueError(
        f"round {round_index} was sampled with policy version {version}, which no checkpoint in {checkpoints.location} "
        f"holds ({'; '.join(there)}): a run with a smaller checkpoint.every and a larger checkpoint.keep keeps more of "
        "them"
    )


def sampled_again(
    rows: list[Row], sampler: Sampler, weights: PolicyWeights, window: range | None
) -> Iterator[tuple[list[Row], TaskReport, ImageBatch]]:
    """Sample a round's tasks again from its ledger rows, with the round's SDE window.

    Yield each task's rows with its report and images.
    """
    for of_task in (list(of_task) for _, of_task in groupby(rows, itemgetter("task"))):
        first = of_task[0]
        prompts = tuple(Prompt(row["prompt"], json.loads(row.get("metadata") or "{}")) for row in of_task)
        seeds = tuple(row["seed"] for row in of_task)
        prefix = tuple(row["prefix_seed"] for row in of_task) if "prefix_seed" in first else None
        task = Task(first["round"], first["task"], first["policy_version"], prompts, seeds, window, prefix_seeds=prefix)
        # Decoding an image without a fingerprint ended the process, so the image was dropped.
        without_image = tuple(number for number, row in enumerate(of_task) if row["image_fingerprint"] == "")
        report, _, images = sampler.sample(task, weights, Care(not_decoded=without_image))
        assert report is not None and images is not None, "no task of this sampler is canceled"
        yield of_task, report, images


def _against_images(
    rows: list[Row], sampler: Sampler, weights: PolicyWeights, window: range | None
) -> Iterator[tuple[int, str]]:
    """Sample the round's tasks again; yield differences by image."""
    for of_task, report, _ in sampled_again(rows, sampler, weights, window):
        for row, fingerprint in zip(of_task, report.image_fingerprints, strict=True):
            if row["image_fingerprint"] != fingerprint:
                text = f"the ledger has {_short(row['image_fingerprint'])}, and re-sampled it is {_short(fingerprint)}"
                yield row["image"], f"{text} ({row['prompt']!r}, seed {row['seed']})"


def _against_schedule(rows: list[Row], scheduled: list[Task]) -> Iterator[tuple[int, str]]:
    """Compare the ledger with the tasks that the recipe schedules; yield differences by image."""
    expected = [
        (task.index, prompt.text, seed, task.policy_version, metadata, prefix)
        for task in scheduled
        for prompt, seed, metadata, prefix in zip(
            task.prompts,
            task.seeds,
            metadata_as_json(task.prompts),
            task.prefix_seeds or [None] * len(task.seeds),
            strict=True,
        )
    ]
    if len(expected) != len(rows):
        raise ValueError(
            f"the ledger has {len(rows)} images of round {rows[0]['round']}, and its recipe {len(expected)}"
        )
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in zip(SCHEDULED, wanted, strict=True):
            if name in row and row[name] != value:  # a ledger without metadata has no such column
                yield row["image"], f"{name} is {row[name]!r} in the ledger, and {value!r} by the recipe"


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "no fingerprint"
