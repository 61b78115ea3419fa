"""ScoringJob: how one task's pictures get their scores although rewards raise, hang or answer nonsense; no clock, no Ray."""

from dataclasses import dataclass, field

import numpy as np

from common.trajectory import Scores


@dataclass(frozen=True)
class ScoringBatch:
    """Neighbouring pictures of a task that are scored in one go, and how often that has failed."""

    first: int
    last: int  # exclusive
    failures: int = 0

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass
class ScoringJob:
    """Batches are cut from the task in order. One that fails is tried again whole, so that a passing fault changes no bit;
    after `attempts` it is halved until the picture at fault stands alone, and that picture is set aside.
    """

    names: tuple[str, ...]  # of the rewards
    count: int  # pictures of the task
    batch_size: int
    attempts: int
    waiting: list[ScoringBatch] = field(init=False)
    _scored: list[tuple[ScoringBatch, Scores]] = field(init=False, default_factory=list)
    _set_aside: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        starts = range(0, self.count, self.batch_size)
        self.waiting = [ScoringBatch(start, min(start + self.batch_size, self.count)) for start in starts]

    @property
    def finished(self) -> bool:
        """Whether every picture has its scores or is set aside."""
        return sum(batch.size for batch, _ in self._scored) + self._alone_without_scores() == self.count

    def _alone_without_scores(self) -> int:
        if not self._set_aside:
            return 0
        scored = {row for batch, _ in self._scored for row in range(batch.first, batch.last)}
        return len(self._set_aside.keys() - scored)

    def scored(self, batch: ScoringBatch, scores: Scores) -> bool:
        """Take a batch's scores; False where some are not finite and the batch is to be tried again."""
        failed = ScoringBatch(batch.first, batch.last, batch.failures + 1)
        if scores.set_aside and failed.failures < self.attempts:
            self.waiting.insert(0, failed)
            return False
        self._scored.append((batch, scores))
        self._set_aside |= {batch.first + row: reason for row, reason in scores.set_aside.items()}
        return True

    def failed(self, batch: ScoringBatch, reason: str) -> None:
        """The batch gave no scores: try again, then halve, then set its one picture aside."""
        failures = batch.failures + 1
        if failures < self.attempts:
            self.waiting.insert(0, ScoringBatch(batch.first, batch.last, failures))
        elif batch.size == 1:
            self._set_aside[batch.first] = reason
        else:
            middle = (batch.first + batch.last) // 2
            # One attempt for a half, so that a reward which hangs costs its time-out once a level; all for one picture.
            halves = ((batch.first, middle), (middle, batch.last))
            self.waiting[:0] = [
                ScoringBatch(first, last, self.attempts - 1 if last - first > 1 else 0) for first, last in halves
            ]

    def lost(self, batch: ScoringBatch) -> None:
        """Whoever scored it died: that is never counted as the reward's fault."""
        self.waiting.insert(0, batch)

    def scores(self) -> Scores:
        """All of the task's scores, NaN where a picture is set aside."""
        assert self.finished, "scores are asked for when all are there"
        rewards = {name: np.full(self.count, np.nan, np.float32) for name in self.names}
        for batch, scores in self._scored:
            for name, values in scores.rewards.items():
                rewards[name][batch.first : batch.last] = values
        seconds = sum((scores.seconds for _, scores in self._scored), 0.0)
        machines = frozenset().union(*(scores.machines for _, scores in self._scored))
        return Scores(rewards, seconds, dict(sorted(self._set_aside.items())), machines)


def backoff_seconds(failures: int) -> float:
    """How long to wait before the next attempt: half a second, then twice as long each time, 30 at the most."""
    return min(30.0, 0.5 * 2 ** max(0, failures - 1)) if failures else 0.0
