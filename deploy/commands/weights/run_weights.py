"""Whose weights a run has: where they lie, which version they are, and that the files hold these very bits."""

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
    """Weights that a run has left, as `lora` or a whole network in the folder at `location`."""

    location: str
    policy_version: int
    fingerprint: str
    manifest: Manifest

    @contextmanager
    def here(self) -> Iterator[Path]:
        """A folder on this machine with them. ValueError: the files hold other weights, or there are none."""
        with weights_here(self.location) as path:
            if not (path / "lora").is_dir() and network_folder(path) is None:
                raise ValueError(
                    f"{self.location} has no weights: the run has not ended; it goes on with --resume auto"
                )
            found = stored_weights(path, self.manifest, self.policy_version).fingerprint
            if found != self.fingerprint:
                raise ValueError(
                    f"the weights in {self.location} have fingerprint {found[:12]}, and those of version {self.policy_version} "
                    f"have {self.fingerprint[:12]}: the run has gone on and not ended; it goes on with --resume auto"
                )
            yield path


def run_weights(folder: RunFolder) -> RunWeights:
    """The run's own: the last, unless the guard has put the best in their place. ValueError: no checkpoint."""
    trained, ended, best = _trained(folder), folder.guard_ended(), folder.best_version()
    if ended and best and ended["weights_of"] is not None:
        return RunWeights(folder.location, best["policy_version"], best["fingerprint"], trained.manifest)
    return RunWeights(folder.location, trained.policy_version, trained.fingerprint, trained.manifest)


def best_weights(folder: RunFolder) -> RunWeights:
    """Those under `best/`. ValueError: no checkpoint, or no version is kept there."""
    best = folder.best_version()
    if best is None:
        raise ValueError(
            f"{folder.location} keeps no best version: that needs evaluation.every, and an evaluation without an alarm"
        )
    manifest = _trained(folder).manifest
    return RunWeights(folder.best.location, best["policy_version"], best["fingerprint"], manifest)


def _trained(folder: RunFolder) -> PolicyWeights:
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        damaged = damaged_checkpoints(folder.checkpoints)
        if damaged:
            raise ValueError(
                f"{folder.location} has no whole checkpoint, {', '.join(damaged)} is damaged, so nobody can tell which weights "
                f"are the run's: restore its files; ddpo sample and ddpo evaluate take {folder.location}/lora without it"
            )
        raise ValueError(f"{folder.location} has no checkpoint yet: no weights are known")
    return load_checkpoint(newest).learner.trained
