"""LearnerGroup: the learner as the driver sees it, on a Ray actor or in the driver's own process."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import ray

from common.lora_weights import LoraWeights
from common.trajectory import Rollout, TrainBatch
from learner.learner import Learner, LearnerState


@dataclass(frozen=True)
class Update:
    """An update under way. `pending` are the references to wait for; `weights` may be one, which nobody here opens."""

    metrics: Any
    weights: Any
    pending: tuple[Any, ...]


class LearnerGroup(ABC):
    """The learner's interface, wherever it runs."""

    @abstractmethod
    def start_update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Update:
        """Begin to learn from a round."""

    @abstractmethod
    def metrics(self, update: Update) -> dict[str, float]:
        """The update's metrics; waits for it. Errors of the update are raised here."""

    @abstractmethod
    def weights(self) -> tuple[LoraWeights, ...]:
        """The versions that samplers may be asked for, the newest last."""

    @abstractmethod
    def state(self) -> LearnerState:
        """A copy of the learner's state."""

    @abstractmethod
    def load_state(self, state: LearnerState) -> None:
        """Go on from `state`."""

    @abstractmethod
    def save_policy(self, folder: str) -> str:
        """Write the trained weights for diffusers; the path written."""


class SerialLearnerGroup(LearnerGroup):
    """The learner in this process."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def start_update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Update:
        metrics, weights = self._learner.update(batch, *(rollout.trajectory for rollout in rollouts))
        return Update(metrics, weights, ())

    def metrics(self, update: Update) -> dict[str, float]:
        return update.metrics

    def weights(self) -> tuple[LoraWeights, ...]:
        return self._learner.weights()

    def state(self) -> LearnerState:
        return self._learner.state()

    def load_state(self, state: LearnerState) -> None:
        self._learner.load_state(state)

    def save_policy(self, folder: str) -> str:
        return self._learner.save_policy(folder)


class RayLearnerGroup(LearnerGroup):
    """The learner on a Ray actor; trajectories go to it by reference, straight from the sampler's node."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def start_update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Update:
        trajectories = [rollout.trajectory for rollout in rollouts]
        metrics, weights = self._actor.update.options(num_returns=2).remote(batch, *trajectories)
        return Update(metrics, weights, (metrics,))

    def metrics(self, update: Update) -> dict[str, float]:
        return ray.get(update.metrics)

    def weights(self) -> tuple[LoraWeights, ...]:
        return ray.get(self._actor.weights.remote())

    def state(self) -> LearnerState:
        return ray.get(self._actor.state.remote())

    def load_state(self, state: LearnerState) -> None:
        ray.get(self._actor.load_state.remote(state))

    def save_policy(self, folder: str) -> str:
        return ray.get(self._actor.save_policy.remote(folder))
