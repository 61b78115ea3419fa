"""ddpo preferences: write a run's best and worst image of each group as a preference file, or check such a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.base_parts import BASE
from ray_ddpo.common.preference_files import Preference, check_new, read_preferences, write_preferences
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.png import png
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import sde_window_of_round
from ray_ddpo.deploy.commands.replay import kept_weights, sampled_again
from ray_ddpo.deploy.commands.weights.given_base import check_base
from ray_ddpo.deploy.driver.components import SAMPLING, build_components, components_of
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.group_ranks import best_and_worst
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation


def check_file(path: str) -> str:
    """Check every row of a preference file. Return how many pairs and prompts it has.

    Raises:
        ValueError: a row cannot be used.
    """
    prompts = [each.prompt for each in read_preferences(Path(path))]
    return f"{path}: {len(prompts)} pairs of {len(set(prompts))} prompts"


def write_file(run: str, output: str) -> str:
    """Write the best and the worst image of each group of a run's ledger. Return what was written and left out.

    An image's rank is that of the aggregated reward it was trained with. Images come from the ledger if it has them
    (`rollouts.images_every`). Otherwise the round is sampled again, if a checkpoint has its weights.

    Raises:
        ValueError: the run has no groups, or no round whose images can be had, or the output cannot be written.
    """
    check_new(Path(output))
    folder = RunFolder(run)
    recipe = folder.load_recipe([])
    group = recipe.prompts.images_per_prompt
    if group < 2:
        raise ValueError(
            f"the run {run} has prompts.images_per_prompt = {group}: a pair needs at least 2 images of a prompt"
        )
    if components_of(recipe, trains=False).policy.has_frames:
        raise ValueError(f"the run {run} has clips, and a preference file has images: take a run of a family of images")
    preferences, left_out = _preferences_of_run(folder, recipe)
    if not preferences:
        raise ValueError(f"the run {run} has no pair to write: {'; '.join(left_out) or 'its ledger is empty'}")
    write_preferences(Path(output), preferences)
    notes = [f"{output}: {len(preferences)} pairs of {len({each.prompt for each in preferences})} prompts", *left_out]
    if recipe.prompts.table().get("image_column"):
        notes.append("the prompts' input images are not in the file: a row has a text and two images")
    return "\n".join(notes)


def _preferences_of_run(folder: RunFolder, recipe: Recipe) -> tuple[list[Preference], list[str]]:
    """Return the pairs of all rounds whose images can be had, and why others are left out."""
    ledger = Ledger(folder.storage, recipe.rollouts)
    found, left_out, again = [], [], _Resampling(folder, recipe)
    for round_index in ledger.rounds():
        try:
            of_round = _preferences_of_round(ledger, round_index, recipe, again)
        except ValueError as error:  # no checkpoint has its weights, or the ledger lacks what it was trained with
            left_out.append(f"round {round_index}: {error}")
            continue
        if not of_round:
            left_out.append(f"round {round_index}: no group has different rewards and a prompt")
        found += of_round
    return found, left_out


def _preferences_of_round(ledger: Ledger, round_index: int, recipe: Recipe, again: "_Resampling") -> list[Preference]:
    """Return a round's pairs with their images.

    Raises:
        ValueError: the ledger lacks what the images were trained with, or their pixels cannot be had.
    """
    table = ledger.read(round_index)
    rewards, prompts = aggregated_rewards(table, recipe), table["prompt"].to_pylist()
    pairs = [pair for pair in _pairs(rewards, recipe.prompts.images_per_prompt) if prompts[pair[0]].strip()]
    if not pairs:
        return []
    images = _stored(table) or again.images(ledger, round_index)
    return [
        Preference(
            prompt=prompts[best],
            chosen=images[best],
            rejected=images[worst],
            chosen_reward=float(rewards[best]),
            rejected_reward=float(rewards[worst]),
        )
        for best, worst in pairs
    ]


def aggregated_rewards(table: pa.Table, recipe: Recipe) -> Float[np.ndarray, "N"]:
    """Return the aggregated reward that each image of a round was trained with, NaN for images of dropped groups.

    It is computed by the recipe's `RewardAggregation`, over each part of the round, from the ledger's columns. If
    advantages are summed (GDPO), it is the aggregated advantage.

    Args:
        table: the round in the ledger.
        recipe: the run's.

    Raises:
        ValueError: the table lacks a column or a number that the run was trained with.
    """
    aggregation, group = RewardAggregation.of(recipe), recipe.prompts.images_per_prompt
    algorithm: Algorithm = build(ALGORITHMS, recipe.algorithm.table(), "algorithm", Algorithm)
    refilled = algorithm.refill_attempts > 0 and len(table) > recipe.images_per_round
    if len(table) % group or not (refilled or len(table) == recipe.images_per_round):
        raise ValueError(f"the ledger has {len(table)} images, and a round of the recipe {recipe.images_per_round}")
    kept = table["dropped"].is_null().to_numpy().reshape(-1, group).all(axis=1).repeat(group)
    if refilled:  # groups that were not trained on have advantages 0
        kept &= (table["advantage"].to_numpy() != 0).reshape(-1, group).any(axis=1).repeat(group)
    rewards = {name: _numbers(table, f"reward/{name}", kept) for name in aggregation.weights}
    parts = {name: _numbers(table, f"joined/{name}", kept) for name in aggregation.compared} or rewards
    path_kl = _numbers(table, "path_kl_nats", kept) if aggregation.kl_reward else None
    found = np.full(len(table), np.nan)
    for of_part in np.split(np.arange(len(table)), recipe.learner.parts_per_round):
        if len(rows := of_part[kept[of_part]]):
            found[rows] = aggregation.aggregate(
                {name: values[rows] for name, values in parts.items()},
                {name: values[rows] for name, values in rewards.items()},
                None if path_kl is None else path_kl[rows],
            )
    return found


def _numbers(table: pa.Table, name: str, kept: np.ndarray) -> Float[np.ndarray, "N"]:
    """Return a column of the ledger. Raise ValueError if it, or its number of an image that was kept, is missing."""
    if name not in table.column_names:
        raise ValueError(f"its ledger has no column {name!r}, which the run's pairs depend on")
    values = table[name].to_numpy()
    if len(missing := np.flatnonzero(kept & ~np.isfinite(values))):
        raise ValueError(f"image {missing[0]} was trained on, and its ledger has no finite {name!r} of it")
    return values


def _pairs(rewards: Float[np.ndarray, "N"], images_per_prompt: int) -> Iterator[tuple[int, int]]:
    """Yield the best and the worst image of each group that was trained on and whose rewards differ."""
    for start in range(0, len(rewards), images_per_prompt):
        group = rewards[start : start + images_per_prompt]
        if not np.isnan(group).any() and (signs := best_and_worst(group, images_per_prompt)).any():
            yield start + int(signs.argmax()), start + int(signs.argmin())


def _stored(table: pa.Table) -> dict[int, bytes]:
    """Return the images that the ledger has, as PNG files by their number in the round."""
    if "pixels" not in table.column_names:
        return {}
    return dict(zip(table["image"].to_pylist(), table["pixels"].to_pylist(), strict=True))


class _Resampling:
    """Sampling of rounds again, with a sampler that is loaded at the first of them."""

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        self._folder = folder
        self._recipe = recipe
        self._sampler: Sampler | None = None

    def images(self, ledger: Ledger, round_index: int) -> dict[int, bytes]:
        """Return the images of a round as PNG files by their number in the round.

        Raises:
            ValueError: no checkpoint has its weights, or the images are not those of the ledger.
        """
        rows: list[dict[str, Any]] = ledger.read(round_index).to_pylist()
        weights = kept_weights(self._folder.checkpoints, round_index, rows[0]["policy_version"])
        window, found = sde_window_of_round(self._recipe, round_index), {}
        for of_task, report, images in sampled_again(rows, self._loaded(ledger, round_index), weights, window):
            for row, fingerprint, pixels in zip(of_task, report.image_fingerprints, images.pixels, strict=True):
                if row["image_fingerprint"] != fingerprint:
                    raise ValueError(
                        f"image {row['image']} is another one when sampled again, so its reward is not that of the "
                        "ledger; `ddpo replay` shows the differences"
                    )
                found[row["image"]] = png(pixels)
        return found

    def _loaded(self, ledger: Ledger, round_index: int) -> Sampler:
        if self._sampler is None:
            components = build_components(self._recipe, used=SAMPLING)
            recipe, source = self._recipe, components.image_source
            self._sampler = Sampler(components.policy, recipe.sampling, recipe.runtime, source=source)
            stood_on = BASE.validate_python(ledger.about(round_index).get("base") or self._folder.base())
            check_base(self._folder, self._sampler.loaded_parts() | prompts_base(components), [], stood_on)
        return self._sampler
