"""Where a run goes on: from its newest checkpoint, or from the start; never over another run's results."""

from typing import Any

from common.run_folder import RunFolder, without_none
from learner.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

# What may change between a run and its continuation without changing the weights it arrives at.
ROLE = ("num_cpus", "num_gpus", "resources", "accelerator_type")
FREE = {
    *("output_dir", "rounds", "samplers", "checkpoint", "rollouts", "evaluation", "trackers"),
    *(f"reward_workers.{key}" for key in ("count", "min", "max", *ROLE)),
    # These decide what becomes of a scoring batch that fails, so which pictures are set aside: where none fails they
    # decide nothing, and where some do a run must be able to go on with more patience.
    *(f"reward_workers.{key}" for key in ("timeout_seconds", "attempts", "max_set_aside")),
    *(f"learner.{key}" for key in (*ROLE, "log_prob_tolerance")),
    *(f"runtime.{key}" for key in ("ready_seconds", "watchdog_seconds", "max_restarts")),
}


def resume_point(folder: RunFolder, tables: dict[str, Any], resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin.

    ValueError: the folder has a run and `resume` is not set, or that run was made with another recipe.
    """
    if not folder.storage.exists(folder.recipe):
        return None
    if not resume:
        raise ValueError(
            f"the run folder {folder.location} exists: go on with --resume auto, or give another --name or --output_dir"
        )
    differing = _differences(folder.recipe_tables(), without_none(tables))
    if differing:
        raise ValueError(f"the run in {folder.location} was made with another recipe: {'; '.join(differing)}")
    newest = newest_checkpoint(folder.checkpoints)
    return load_checkpoint(newest) if newest else None


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        if f"{prefix}{key}" in FREE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return found
