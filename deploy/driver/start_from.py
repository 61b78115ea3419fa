"""Start a new run, with other keys, from the weights of an earlier one: `ddpo train RECIPE --from RUN[@ROUND]`."""

import re
from dataclasses import dataclass, replace
from typing import Any

from ray_ddpo.common.base_parts import MODEL_KEYS, Base
from ray_ddpo.common.diffusion.trained_weights import stored_weights
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.tables import StartFromTable
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, checkpoint_of, load_checkpoint, newest_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState

# Keys that decide which parameters are trained, and their strength.
SAME_ALWAYS = ("name", "train")
SAME_ADAPTER = ("rank", "alpha", "target_modules")
BEST = "best"


@dataclass(frozen=True)
class EarlierRun:
    """Weights that a new run starts from, their source as a recipe table, and the base that they were trained on."""

    table: StartFromTable
    weights: PolicyWeights
    base: Base

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the new run's state before its first round, with new optimizer state and statistics."""
        return Checkpoint(0, LearnerState(0, (self.weights,), {}, {}), {})


def start_from_of(text: str) -> StartFromTable:
    """Parse the argument of `--from`: RUN, RUN@ROUND, RUN@best or RUN/best."""
    if text.rstrip("/").endswith(f"/{BEST}"):
        return StartFromTable(run=text.rstrip("/").removesuffix(f"/{BEST}"), round=BEST)
    run, at, which = text.rpartition("@")
    if not at or "/" in which:
        return StartFromTable(run=text)
    if not run or not re.fullmatch(rf"[1-9]\d{{0,8}}|{BEST}", which):
        raise ValueError(
            f"--from is {text!r}: it must be a run's folder, or folder@ROUND with a number of rounds "
            f"done, or folder@{BEST}"
        )
    return StartFromTable(run=run, round=BEST if which == BEST else int(which))


def earlier_run(table: StartFromTable, components: Components) -> EarlierRun:
    """Read the weights that a recipe's `[start_from]` names.

    Raises:
        ValueError: the weights are missing, or do not fit the recipe.
    """
    folder = RunFolder(table.run)
    folder.refuse_if_no_run(f"--from {table.run}: ")
    _refuse_other_weights(folder, components)
    round_index, weights = _weights(folder, table.round)
    if table.fingerprint not in (None, weights.fingerprint):
        raise ValueError(
            f"start_from.fingerprint is {table.fingerprint!r}, and the weights in {folder.location} have "
            f"{weights.fingerprint!r}: leave the key out to start from these"
        )
    base = {name: part for name, part in folder.base().items() if name.startswith(MODEL_KEYS)}
    found = StartFromTable(run=folder.location, round=round_index, fingerprint=weights.fingerprint)
    return EarlierRun(found, replace(weights, policy_version=0), base)


def _refuse_other_weights(folder: RunFolder, components: Components) -> None:
    """Raise ValueError if the recipe trains other parameters than the earlier run did."""
    before, now = folder.recipe_tables()["policy"], components.resolved()["policy"]
    differing = [_difference(f"policy.{key}", before.get(key), now.get(key)) for key in SAME_ALWAYS]
    if not any(differing) and now["train"] == "lora":
        adapters = before.get("lora", {}), now.get("lora", {})
        # If both start from a LoRA file, their fingerprints are compared elsewhere, so that the file may have moved.
        keys = () if all(each.get("path") for each in adapters) else (*SAME_ADAPTER, "path")
        differing += [_difference(f"policy.lora.{key}", *(each.get(key) for each in adapters)) for key in keys]
    if any(differing):
        said = "; ".join(difference for difference in differing if difference)
        raise ValueError(
            f"--from {folder.location}: its weights do not fit this recipe: {said}; give these keys as that run has "
            "them"
        )


def _difference(key: str, before: Any, now: Any) -> str:
    """Return the difference of two values in words; empty if they are equal."""
    before, now = (sorted(value) if isinstance(value, list | tuple) else value for value in (before, now))
    return "" if before == now else f"{key} was {before!r} and is {now!r}"


def _weights(folder: RunFolder, which: int | str | None) -> tuple[int, PolicyWeights]:
    """Return the number of rounds that the weights were trained on, and the weights."""
    ended = folder.guard_ended()
    if which == BEST or (which is None and ended and ended["weights_of"] is not None):  # `lora/` holds the best then
        return _best(folder)
    if isinstance(which, int):
        found = load_checkpoint(checkpoint_of(folder.checkpoints, which))
    else:
        found = load_checkpoint(_newest(folder))
    return found.rounds_done, found.learner.trained


def _newest(folder: RunFolder) -> Any:
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        raise ValueError(f"--from {folder.location}: it has no intact checkpoint yet, so no weights to start from")
    return newest


def _best(folder: RunFolder) -> tuple[int, PolicyWeights]:
    """Load the best version's weights, and compare their fingerprint with the recorded one."""
    best = folder.best_version()
    if best is None:
        raise ValueError(f"--from {folder.location}@{BEST}: it keeps no best version: that needs evaluation.every")
    manifest = load_checkpoint(_newest(folder)).learner.trained.manifest
    with weights_here(folder.best.location) as path:
        weights = stored_weights(path, manifest, best["policy_version"])
    if weights.fingerprint != best["fingerprint"]:
        raise ValueError(f"the weights in {folder.best.location} are not those that were kept there: restore them")
    return best["policy_version"], weights
