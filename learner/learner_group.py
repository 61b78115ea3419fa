"""LearnerGroup: the learner as the driver sees it, on a Ray actor or in the driver's own process."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from jaxtyping import Float
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from common.lora_weights import LoraWeights
from common.trajectory import Rollout, Scored, TrainBatch
from learner.learner import Learner
from learner.learner_state import LearnerState

STACKS_SECONDS = 5.0

Wait = Callable[[tuple[Any, ...], bool], None]  # keeps the other side at work until these are there; is a model loaded?
Learned = tuple[dict[str, float], LearnerState]


class TrajectoriesLost(RuntimeError):
    """Trajectories that were not read yet went with their node; the round is to be drawn again."""


class LearnerGroup(ABC):
    """The learner's interface, wherever it runs."""

    @abstractmethod
    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        """Learn from a part of a round, while the parts after it are still drawn. Errors are raised by `update`."""

    @abstractmethod
    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        """Learn from a round, or from its last part; its metrics and the state after it. Errors of the round are raised here.

        TrajectoriesLost: the round has to be drawn again, and begun anew.
        """

    @abstractmethod
    def weights(self) -> tuple[LoraWeights, ...]:
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
    def save_policy(self, folder: str, weights: LoraWeights | None = None) -> str:
        """Write the trained weights, or those given, for diffusers; the path written."""

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

    def weights(self) -> tuple[LoraWeights, ...]:
        return self._learner.weights()

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._learner.log_ratios()

    def load_state(self, state: LearnerState) -> None:
        self._learner.load_state(state)

    def check_folder(self, folder: str, token: str) -> None:
        self._learner.check_folder(folder, token)

    def save_policy(self, folder: str, weights: LoraWeights | None = None) -> str:
        return self._learner.save_policy(folder, weights)

    def stacks(self) -> str:
        return self._learner.stacks()

    def close(self) -> None:
        """It ends with this process."""


def title_of(batch: TrainBatch) -> str:
    """What is learned from, as the dashboard shows it; the class comes first because Ray makes it the process's name too."""
    return f"Learner: learn from round {batch.round}" + (f", part {batch.part}" if batch.parts > 1 else "")


class RayLearnerGroup(LearnerGroup):
    """The learner on a Ray actor; trajectories go to it by reference, straight from the sampler's node.

    After each update the driver takes its state over, so a learner that dies is started again from the last whole round.
    """

    def __init__(self, actor: Any, make: Callable[[], Any], wait: Wait, on_death: Callable[[str], None]) -> None:
        """`make` starts another actor, `wait` waits for references, `on_death` counts deaths and may refuse another start."""
        self._actor = actor
        self._make = make
        self._wait = wait
        self._on_death = on_death
        self._state: LearnerState | None = None  # after the last whole round
        self._begun: list[Scored] = []  # parts of the present round
        self._beginning: list[Any] = []  # references to what comes of them

    def wait_until_loaded(self) -> None:
        """Wait for the actor; an error of its constructor is raised."""
        self._state = self._call("state")

    def _call(self, method: str, *arguments: Any) -> Any:
        """One call, on a new actor from the last state where the present one dies."""
        while True:
            reference = getattr(self._actor, method).remote(*arguments)
            self._wait((reference,), True)
            try:
                return ray.get(reference)
            except RayActorError as error:
                self._restart(error)

    def _restart(self, error: RayError) -> None:
        if isinstance(error, RayActorError) and error.actor_init_failed:  # the same would happen to the next one
            raise error
        self._on_death(str(error))
        ray.kill(self._actor)
        self._actor = self._make()
        if self._state is not None:
            self._call("load_state", self._state)

    def begin(self, batch: TrainBatch, rollouts: list[Rollout]) -> None:
        self._begun.append((batch, rollouts))
        begin = self._actor.begin.options(name=title_of(batch))
        self._beginning.append(begin.remote(batch, *(rollout.trajectory for rollout in rollouts)))

    def update(self, batch: TrainBatch, rollouts: list[Rollout]) -> Learned:
        while True:
            trajectories = [rollout.trajectory for rollout in rollouts]
            update = self._actor.update.options(num_returns=2, name=title_of(batch))
            metrics, state = update.remote(batch, *trajectories)
            self._wait((*self._beginning, metrics, state), False)
            try:
                ray.get(self._beginning)  # first: after a part that failed, the next is refused
                learned: Learned = ray.get(metrics), ray.get(state)
            except RayTaskError as error:  # first: Ray makes it an error of its cause's class too
                if not isinstance(error.cause, ObjectLostError):
                    raise
                self._undo()
                raise TrajectoriesLost(f"round {batch.round}: {error.cause}") from error
            except (RayActorError, ObjectLostError) as error:  # it died, or its node went with the state
                self._restart(error)
                for part in self._undo():
                    self.begin(*part)
            else:
                self._state = learned[1]
                self._begun, self._beginning = [], []
                return learned

    def _undo(self) -> list[Scored]:
        """Back to the last whole round; the parts that were begun since."""
        begun, self._begun, self._beginning = self._begun, [], []
        if begun:
            self._call("load_state", self._state)
        return begun

    def weights(self) -> tuple[LoraWeights, ...]:
        return self._call("weights")

    def log_ratios(self) -> Float[np.ndarray, "N"]:
        return self._call("log_ratios")

    def load_state(self, state: LearnerState) -> None:
        self._state = state
        self._call("load_state", ray.put(state))

    def check_folder(self, folder: str, token: str) -> None:
        self._call("check_folder", folder, token)

    def save_policy(self, folder: str, weights: LoraWeights | None = None) -> str:
        return self._call("save_policy", folder, weights)

    def stacks(self) -> str:
        try:
            return ray.get(self._actor.stacks.options(concurrency_group="health").remote(), timeout=STACKS_SECONDS)
        except GetTimeoutError:
            return f"it does not answer within {STACKS_SECONDS:g} s"
        except RayError as error:
            return f"it cannot be asked: {error}"

    def close(self) -> None:
        ray.kill(self._actor)
