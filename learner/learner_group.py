"""LearnerGroup: the learner as the driver sees it, and in the driver's own process."""

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

# Keeps the other side at work until one of these is there; is a model loaded?
Wait = Callable[[tuple[Any, ...], bool], None]
Learned = tuple[dict[str, float], LearnerState]


class TrajectoriesLost(RuntimeError):
    """Trajectories that were not read yet went with their node; the round is to be re-sampled."""


class LearnerGroup(ABC):
    """The learner's interface, wherever it runs."""

    @abstractmethod
    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        """Learn from a part of a round, while the parts after it are still sampled. Errors are raised by `update`."""

    @abstractmethod
    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        """Learn from a round, or from its last part; its metrics and the state after it. Errors of the round are raised here.

        TrajectoriesLost: the round has to be re-sampled, and begun again.
        """

    @abstractmethod
    def weights(self) -> tuple[PolicyWeights, ...]:
        """The versions that samplers may be asked for, the newest last."""

    @abstractmethod
    def log_ratios(self) -> Float[np.ndarray, "N"]:
        """log_prob − old_log_prob of the pairs of the last round, to be looked at; empty where the learner has none."""

    @abstractmethod
    def load_state(self, state: LearnerState) -> None:
        """Go on from `state`."""

    @abstractmethod
    def check_folder(self, folder: str, token: str) -> None:
        """ValueError: where the learner runs, the run's folder is another one than the driver's."""

    @abstractmethod
    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        """Write the trained weights, or those given, for diffusers; the path written."""

    @abstractmethod
    def machine(self) -> Machine | None:
        """Return what rank 0 computes on, once it is loaded."""

    @abstractmethod
    def stacks(self) -> str:
        """What the learner's threads are doing."""

    @abstractmethod
    def close(self) -> None:
        """End it."""


class SerialLearnerGroup(LearnerGroup):
    """The learner in this process."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        self._learner.begin(batch, *(rollout.trajectory for rollout in rollouts))

    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        return self._learner.update(batch, *(rollout.trajectory for rollout in rollouts))

    def weights(self) -> tuple[PolicyWeights, ...]:
        return self._learner.weights()

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._learner.log_ratios()

    def load_state(self, state: LearnerState) -> None:
        self._learner.load_state(state)

    def check_folder(self, folder: str, token: str) -> None:
        self._learner.check_folder(folder, token)

    def save_policy(self, folder: str, weights: PolicyWeights | None = None) -> str:
        return self._learner.save_policy(folder, weights)

    def machine(self) -> Machine | None:
        return self._learner.state().machine

    def stacks(self) -> str:
        return self._learner.stacks()

    def close(self) -> None:
        """It ends with this process."""
