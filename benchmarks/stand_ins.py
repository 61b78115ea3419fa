"""Stand-ins for the three actors. They sleep for a set time instead of computing, and import no torch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.stand_in_records import Sampled, Scored
from ray_ddpo.common.policy_versions import kept_versions
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.schedule import Place, Task
from ray_ddpo.common.trajectory import TrainBatch

# Too large for Ray to inline in a reply, so the result takes the same way as real trajectories and images.
HEAVY_BYTES = 200_000


@dataclass(frozen=True)
class StandInState:
    """A LearnerState with the fields that the driver reads."""

    policy_version: int
    weights: tuple[PolicyWeights, ...]

    @property
    def trained(self) -> PolicyWeights:
        return self.weights[-1]

    def with_optimizer_state(self, shards: list[dict[str, np.ndarray]]) -> "StandInState":
        return self


@dataclass
class Timesheet:
    """When a stand-in was at work and when it was told to sleep, by the clock that all processes of a machine share."""

    worked: list[tuple[float, float]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    @contextmanager
    def work(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.worked.append((began, time.monotonic()))


class StandInSampler:
    """A sampler that takes a set time per task."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._forgotten: set[Place] = set()
        self._timesheet = Timesheet()

    def ready(self) -> bool:
        return True

    def stacks(self) -> str:
        return "asleep"

    def sleep(self) -> None:
        self._timesheet.slept.append(time.monotonic())

    def timesheet(self) -> Timesheet:
        return self._timesheet

    def forget(self, place: Place) -> None:
        self._forgotten.add(place)

    def sample(
        self, task: Task, weights: PolicyWeights, care: object = None, note: object = None
    ) -> tuple[Sampled, np.ndarray, np.ndarray] | tuple[None, None, None]:
        if task.place in self._forgotten:
            self._forgotten.remove(task.place)
            return None, None, None
        assert weights.policy_version == task.policy_version
        with self._timesheet.work():
            time.sleep(self._seconds)
        heavy = np.zeros(HEAVY_BYTES, np.uint8)
        return Sampled(task, weights.fingerprint, 1, HEAVY_BYTES, self._seconds), heavy, heavy.copy()


class StandInRewardWorker:
    """A reward worker that takes a set time per task."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def ready(self) -> bool:
        return True

    def stacks(self) -> str:
        return "asleep"

    def score(self, images: np.ndarray, first: int = 0, last: int | None = None, note: object = None) -> Scored:
        assert last is not None and images.nbytes == HEAVY_BYTES
        time.sleep(self._seconds)
        return Scored({"stand_in": np.zeros(last - first, np.float32)}, self._seconds)


class StandInLearner:
    """A rank that takes a set time per round, in equal parts, and publishes weights of a set size."""

    def __init__(self, seconds: float, max_policy_lag: int, weight_bytes: int) -> None:
        self._seconds = seconds
        self._max_policy_lag = max_policy_lag
        self._buffer = np.zeros(weight_bytes // 4, np.float32)
        self._published = (self._weights(0),)
        self._timesheet = Timesheet()

    def _weights(self, version: int) -> PolicyWeights:
        return pack(version, {"stand_in": self._buffer})

    def ready(self) -> bool:
        return True

    def stacks(self) -> str:
        return "asleep"

    def join(self, rendezvous: str) -> None:
        """Do nothing: stand-ins reduce nothing."""

    def sleep(self) -> None:
        self._timesheet.slept.append(time.monotonic())

    def timesheet(self) -> Timesheet:
        return self._timesheet

    def weights(self) -> tuple[PolicyWeights, ...]:
        return self._published

    def state(self, newest_only: bool = False) -> StandInState:
        return StandInState(self._published[-1].policy_version, self._published)

    def load_state(self, state: StandInState, *weights: PolicyWeights) -> None:
        self._published = weights or state.weights

    def begin(self, batch: TrainBatch, *trajectories: np.ndarray) -> None:
        self._refuse_others(batch, trajectories)
        time.sleep(self._seconds / batch.parts)

    def _refuse_others(self, batch: TrainBatch, trajectories: tuple[np.ndarray, ...]) -> None:
        known = {weights.policy_version: weights.fingerprint for weights in self._published}
        assert all(known[report.task.policy_version] == report.fingerprint for report in batch.reports)
        assert len(trajectories) == len(batch.reports)

    def lead(
        self, batch: TrainBatch, *trajectories: np.ndarray
    ) -> tuple[dict[str, float], PolicyWeights, StandInState]:
        self._learn(batch, trajectories)
        return {"seconds/learn": self._seconds}, self._published[-1], replace(self.state(), weights=())

    def follow(self, batch: TrainBatch, *trajectories: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
        self._learn(batch, trajectories)
        return self._published[-1].fingerprint, {}

    def _learn(self, batch: TrainBatch, trajectories: tuple[np.ndarray, ...]) -> None:
        """Publish the next version after the set time, of which checking and packing are a part."""
        started = time.perf_counter()
        with self._timesheet.work():
            self._refuse_others(batch, trajectories)
            weights = self._weights(self._published[-1].policy_version + 1)
            self._published = kept_versions((*self._published, weights), self._max_policy_lag)
            seconds = self._seconds / batch.parts
            time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
