"""BestVersion: the weights that were best on held-out images before any alarm, in the run's folder under `best/`."""

import json

from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.tables import GuardTable
from ray_ddpo.common.run_storage.run_folder import BEST, WEIGHTS, RunFolder
from ray_ddpo.deploy.evaluation.guard import Judged, best_version
from ray_ddpo.learner.learner_group import LearnerGroup


class BestVersion:
    """Keeps one version; the weights lie as a run's own do, so whatever takes a run's folder takes `best/` too."""

    def __init__(self, folder: RunFolder, learner: LearnerGroup, settings: GuardTable) -> None:
        self._folder = folder
        self._learner = learner
        self._settings = settings
        self.policy_version: int | None = None

    def consider(self, judged: list[Judged], weights: PolicyWeights) -> None:
        """After an evaluation, the last of `judged`, of `weights`: keep them where they are the best now."""
        self.policy_version = best_version(judged)
        newest = judged[-1]
        if self.policy_version != newest.policy_version:
            return
        says = {
            "policy_version": newest.policy_version,
            "fingerprint": weights.fingerprint,
            "best_by": self._settings.best_by,
            "score": newest.score,
        }
        self._folder.unwritten.call(lambda: self._write(weights, json.dumps(says, indent=1).encode()))

    def _write(self, weights: PolicyWeights, says: bytes) -> None:
        self._learner.save_policy(self._folder.best.location, weights)
        self._folder.best.write(BEST, says)

    def roll_back(self) -> int | None:
        """Put its weights in the place of the run's own; its version. None: no version was ever without an alarm."""
        says = self._folder.best_version()
        best = self._folder.best
        for name in [name for name in WEIGHTS if best.exists(name)]:
            self._folder.storage.remove(name)
            for file in best.names(name):
                self._folder.storage.write(f"{name}/{file}", best.read(f"{name}/{file}"))
        return says["policy_version"] if says else None
