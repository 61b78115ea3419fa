"""LearnerGroup: the driver's interface to the learner, and the learner in the driver's process."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.trajectory import Rollout, TrainBatch
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner import Learner

# Blocks until one of some references is ready, and keeps samplers and reward workers busy meanwhile
# (`RayRolloutStream.keep_busy_until_ready`). The flag: a model is being loaded.
Wait = Callable[[tuple[Any, ...], bool], None]
Learned = tuple[dict[str, float], LearnerState]


class TrajectoriesLost(RuntimeError):
    """Trajectories that were not read yet were lost with their node, so the round must be re-sampled."""


class LearnerGroup(ABC):
    """The interface of a learner, in one process or on Ray."""

    @abstractmethod
    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        """Train on a part of a round, while later parts are still being sampled. Errors are raised by `update`."""

    @abstractmethod
    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        """Train on a round, or on its last part. Errors of the round's earlier parts are raised here.

        Returns:
            The round's metrics, and the state after the round.

        Raises:
            TrajectoriesLost: the round must be re-sampled, and begun again.
        """

    @abstractmethod
    def weights(self) -> tuple[PolicyWeights, ...]:
        """Return the versions that rounds may still be sampled with, the newest last."""

    @abstractmethod
    def log_ratios(self) -> Float[np.ndarray, "N"]:
        """Return log_prob − old_log_prob of the last round's transitions, for trackers; empty if there are none."""

    @abstractmethod
    def load_state(self, state: LearnerState) -> None:
        """Resume from `state`."""

    @abstractmethod
    def restore_last_round(self) -> None:
        """Go back to the state after the last completed round, and discard what was trained since."""

    @abstractmethod
    def check_folder(self, folder: str, token: str) -> None:
        """Check that the run's folder is the same on the learner's machine and on the driver's.

        Raises:
            ValueError: it is not.
        """

    @abstractmethod
    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        """Write the trained weights, or `weights`, for diffusers, and return their location."""

    @abstractmethod
    def machine(self) -> Machine | None:
        """Return the machine of rank 0, or None before it is loaded."""

    @abstractmethod
    def stacks(self) -> str:
        """Return the stacks of the learner's threads."""

    @abstractmethod
    def close(self) -> None:
        """End the learner."""


class SerialLearnerGroup(LearnerGroup):
    """The learner in this process."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._state: LearnerState | None = None  # after the last completed round

    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        self._learner.begin(batch, *(rollout.trajectory for rollout in rollouts))

    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        learned = self._learner.update(batch, *(rollout.trajectory for rollout in rollouts))
        self._state = learned[1]
        return learned

    def weights(self) -> tuple[PolicyWeights, ...]:
        return self._learner.weights()

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._learner.log_ratios()

    def load_state(self, state: LearnerState) -> None:
        self._state = state
        self._learner.load_state(state)

    def restore_last_round(self) -> None:
        assert self._state is not None, "no round is completed, and no state was loaded"
        self._learner.load_state(self._state)

    def check_folder(self, folder: str, token: str) -> None:
        self._learner.check_folder(folder, token)

    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        return self._learner.save_policy(folder, weights)

    def machine(self) -> Machine | None:
        return self._learner.state().machine

    def stacks(self) -> str:
        return self._learner.stacks()

    def close(self) -> None:
        """Do nothing: the learner ends with this process."""
