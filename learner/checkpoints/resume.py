"""Decide where a run resumes: from its newest checkpoint, or from the start; never over another run's results."""

from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

from ray_ddpo.common.run_storage.run_folder import RunFolder, without_none
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint

# Keys that may change when a run resumes, without changing the weights after its last round.
ROLE = ("num_cpus", "num_gpus", "resources", "accelerator_type")
WORKERS = ("count", "min", "max", "cache", *ROLE)
# These keys decide which images are dropped after a scoring batch failed. Without failures they decide nothing; after
# failures a run must be able to resume with longer time limits and more attempts.
PATIENCE = ("timeout_seconds", "attempts")
FREE = (
    *("output_dir", "rounds", "samplers", "checkpoint", "rollouts", "evaluation", "guard", "media", "push"),
    "trackers",
    *(
        f"{pool}.{key}"
        for pool in ("reward_workers", "reward.workers", "rewards.*.workers")
        for key in WORKERS + PATIENCE
    ),
    "reward_workers.max_dropped",
    *(f"learner.{key}" for key in (*ROLE, "colocated", "log_prob_tolerance", "shard_optimizer_state")),
    *(f"runtime.{key}" for key in ("ready_seconds", "watchdog_seconds", "max_restarts")),
    "policy.cuda_graphs",
)


def resume_point(
    folder: RunFolder,
    tables: dict[str, Any],
    resume: bool,
    places: Collection[str] = (),
    defaults: dict[str, Any] | None = None,
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        tables: the recipe.
        places: keys of paths to files, which may change because the files are compared by fingerprint.
        defaults: the default of each key that has one. A key that is younger than the run had its default in it.

    Raises:
        ValueError: the folder has a run and `resume` is not set, or that run was made with another recipe.
    """
    if not folder.storage.exists(folder.recipe):
        return None
    if not resume:
        raise ValueError(
            f"the run folder {folder.location} exists: resume it with --resume auto, or give another --name or "
            f"--output_dir; --from {folder.location} starts the other run from this one's weights"
        )
    differing = _differences(
        folder.recipe_tables(), without_none(tables), [*FREE, *places], without_none(defaults or {})
    )
    if differing:
        raise ValueError(
            f"the run in {folder.location} was made with another recipe: {'; '.join(differing)}; to train its weights "
            f"further with other keys start a new run: --from {folder.location} and another --name"
        )
    newest = newest_checkpoint(folder.checkpoints)
    return load_checkpoint(newest) if newest else None


def _differences(
    before: dict[str, Any], now: dict[str, Any], free: list[str], defaults: dict[str, Any], prefix: str = ""
) -> list[str]:
    """List the keys that differ between two recipes, but for those that match `free`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if any(fnmatch(f"{prefix}{key}", each) for each in free):
            continue
        default = _by_position(defaults.get(key))
        old, new = _by_position(before.get(key, default)), _by_position(now.get(key))
        if isinstance(old, dict) and isinstance(new, dict):
            inner = default if isinstance(default, dict) else {}
            found += _differences(old, new, free, inner, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r} and is {new!r}")
    return found


def _by_position(value: Any) -> Any:
    """Convert a list of tables to a table by position, so that tables at the same position are compared key by key."""
    if isinstance(value, list | tuple) and value and all(isinstance(table, dict) for table in value):
        return {str(position): table for position, table in enumerate(value)}
    return value
