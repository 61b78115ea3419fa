"""Find the weights of a run: their location and version, and a check of their fingerprint."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_ddpo.common.diffusion.trained_weights import stored_weights
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.policy_weights import Manifest, PolicyWeights
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from ray_ddpo.learner.checkpoints.checkpoint import damaged_checkpoints, load_checkpoint, newest_checkpoint


@dataclass(frozen=True)
class RunWeights:
    """Weights of a run, as `lora` or a full network in the folder at `location`."""

    location: str
    policy_version: int
    fingerprint: str
    manifest: Manifest

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Yield a folder on this machine with the weights.

        Raises:
            ValueError: the files are missing or hold other weights.
        """
        with weights_here(self.location) as path:
            if not (path / "lora").is_dir() and network_folder(path) is None:
                raise ValueError(f"{self.location} has no weights: the run has not ended; resume it with --resume auto")
            found = stored_weights(path, self.manifest, self.policy_version).fingerprint
            if found != self.fingerprint:
                raise ValueError(
                    f"the weights in {self.location} have fingerprint {found[:12]}, and those of version "
                    f"{self.policy_version} have {self.fingerprint[:12]}: the run has gone on and not ended; "
                    "resume it with --resume auto"
                )
            yield path


def run_weights(folder: RunFolder) -> RunWeights:
    """Return a run's own weights: the last, or the best if the guard rolled back.

    Raise ValueError without a checkpoint.
    """
    trained, ended, best = _trained(folder), folder.guard_ended(), folder.best_version()
    if ended and best and ended["weights_of"] is not None:
        return RunWeights(folder.location, best["policy_version"], best["fingerprint"], trained.manifest)
    return RunWeights(folder.location, trained.policy_version, trained.fingerprint, trained.manifest)


def best_weights(folder: RunFolder) -> RunWeights:
    """Return the weights under `best/`. Raise ValueError if there are none, or if there is no checkpoint."""
    best = folder.best_version()
    if best is None:
        raise ValueError(
            f"{folder.location} keeps no best version: that needs evaluation.every, and an evaluation without an alarm"
        )
    manifest = _trained(folder).manifest
    return RunWeights(folder.best.location, best["policy_version"], best["fingerprint"], manifest)


def _trained(folder: RunFolder) -> PolicyWeights:
    """Load the newest checkpoint's trained weights."""
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        damaged = damaged_checkpoints(folder.checkpoints)
        if damaged:
            raise ValueError(
                f"{folder.location} has no intact checkpoint, {', '.join(damaged)} is damaged, so the run's "
                "weights are unknown: restore its files; ddpo sample and ddpo evaluate take "
                f"{folder.location}/lora without it"
            )
        raise ValueError(f"{folder.location} has no checkpoint yet: no weights are known")
    return load_checkpoint(newest).learner.trained
