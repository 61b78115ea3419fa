"""ScoringJob: score a task's images although rewards raise, hang, die or return wrong values; no clock, no Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_ddpo.actors.rewards.backoff import backoff_seconds
from ray_ddpo.actors.rollouts.inquiry import Control, Inquiry
from ray_ddpo.actors.task_care import DEATHS
from ray_ddpo.common.trajectory import Scores, summed_usage


@dataclass(frozen=True)
class ScoringBatch:
    """Neighboring images of a task that are scored in one call, and the history of attempts."""

    first: int
    last: int  # exclusive
    failures: int = 0
    deaths: int = 0  # of workers that were scoring the batch
    halved: bool = False  # part of a batch that failed, of which some images pass
    one_by_one: bool = False  # only to find the image that kills its worker: the scores are discarded
    cleared: bool = False  # none of its images killed a worker when scored alone
    inquiry: Inquiry | None = None  # the inquiry that tries this image; the score is discarded
    of_control: bool = False  # the image is not of this task, but the control, which was scored before

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def is_new(self) -> bool:
        """Return whether the batch has no history, so that it may be scored together with other tasks' batches."""
        return self == ScoringBatch(self.first, self.last)

    @property
    def pause_seconds(self) -> float:
        """Return the pause before this attempt. Only a retry of the same batch waits, because the fault may pass."""
        return 0.0 if self.inquiry or (self.halved and self.size > 1) else backoff_seconds(self.failures)


@dataclass
class ScoringJob:
    """The batches of a task, cut in order. A failed batch is retried unchanged, so that a passing fault changes no bit.

    After `attempts` an `Inquiry` tries images alone. If none passes, the reward is `broken`. Otherwise the batch is
    halved until the image at fault is alone, and that image is dropped.

    A worker's death is not the reward's fault, unless two workers die over one batch. Then images are tried one by one,
    and an image over which two more workers die is dropped. If there is no such image, the full batch is retried.

    Rows without an image are not scored.
    """

    names: tuple[str, ...]  # of rewards
    count: int  # images of the task
    batch_size: int
    attempts: int
    images: Any = None  # the task's, or a reference to them
    control: Control = field(default_factory=Control)  # shared by all jobs of a pool
    without_image: Mapping[int, str] = field(default_factory=dict)  # by row: why there is no image to score
    waiting: list[ScoringBatch] = field(init=False)
    broken: Inquiry | None = field(init=False, default=None)  # the reward fails for every image
    _scored: list[tuple[ScoringBatch, Scores]] = field(init=False, default_factory=list)
    _dropped: dict[int, str] = field(init=False, default_factory=dict)
    _usage: list[dict[str, float]] = field(init=False, default_factory=list)  # also of scores that are discarded
    _deaths_alone: dict[int, int] = field(init=False, default_factory=dict)  # by row

    def __post_init__(self) -> None:
        starts = range(0, self.count, self.batch_size)
        batches = [ScoringBatch(start, min(start + self.batch_size, self.count)) for start in starts]
        self.waiting = [part for batch in batches for part in self._with_image(batch)]
        self._dropped |= self.without_image

    def _with_image(self, batch: ScoringBatch) -> list[ScoringBatch]:
        """Return the batch, or its parts before, between and after rows without an image."""
        gaps = [row for row in range(batch.first, batch.last) if row in self.without_image]
        firsts, lasts = [batch.first, *(row + 1 for row in gaps)], [*gaps, batch.last]
        return [ScoringBatch(first, last) for first, last in zip(firsts, lasts, strict=True) if first < last]

    @property
    def finished(self) -> bool:
        """True if every image has its scores or is dropped."""
        return sum(batch.size for batch, _ in self._scored) + self._alone_without_scores() == self.count

    def _alone_without_scores(self) -> int:
        if not self._dropped:
            return 0
        scored = {row for batch, _ in self._scored for row in range(batch.first, batch.last)}
        return len(self._dropped.keys() - scored)

    def images_of(self, batch: ScoringBatch) -> Any:
        """Return the images, or a reference to them, that contain the batch's rows."""
        return self.control.images if batch.of_control else self.images

    def scored(self, batch: ScoringBatch, scores: Scores) -> bool:
        """Take a batch's scores.

        Returns:
            False if some scores are not finite and the batch is retried.
        """
        self._usage.append(scores.usage)
        if inquiry := batch.inquiry:  # this image passes, so the reward is not broken
            if inquiry.is_decided:
                self._dropped |= inquiry.reasons_in_batch
            else:
                self._halve(ScoringBatch(inquiry.first, inquiry.last), halved=True, failures=self.attempts - 1)
            return True
        if batch.one_by_one:
            self._retry_full(batch)
            return True
        if scores.dropped and batch.failures + 1 < self.attempts:
            self._next(replace(batch, failures=batch.failures + 1))
            return False
        self._scored.append((batch, scores))
        self._dropped |= {batch.first + row: reason for row, reason in scores.dropped.items()}
        if self.images is not None and len(scores.dropped) < batch.size:
            row = next(row for row in range(batch.size) if row not in scores.dropped)
            self.control.images, self.control.row = self.images, batch.first + row
        return True

    def failed(self, batch: ScoringBatch, reason: str, trace: str = "") -> None:
        """Handle a batch whose reward failed.

        Args:
            trace: the reward's frames, for the user.
        """
        failures = batch.failures + 1
        if batch.inquiry:
            if not batch.of_control:
                batch.inquiry.reasons[batch.first] = reason
            self._continue(batch.inquiry, control_failed=batch.of_control)
        elif batch.one_by_one:  # its worker lives: the error comes again when the full batch is retried
            self._retry_full(batch)
        elif failures < self.attempts:
            self._next(replace(batch, failures=failures))
        elif not batch.halved:
            rows_of_batch = (batch.first, batch.last)
            rows = [row for row in range(self.count) if row not in self.without_image]
            self._continue(Inquiry.into(rows_of_batch, rows, (reason, trace), self.control))
        elif batch.size == 1:
            self._dropped[batch.first] = reason
        else:
            # One attempt for a half, so that a reward that hangs costs one time-out a level; all attempts for a
            # single image.
            self._halve(batch, halved=True, failures=self.attempts - 1)

    def _next(self, *batches: ScoringBatch) -> None:
        self.waiting[:0] = batches

    def _continue(self, inquiry: Inquiry, control_failed: bool = False) -> None:
        """Try the inquiry's next image, then the control. If all fail, the reward is broken."""
        if inquiry.rows:
            row = inquiry.rows.pop(0)
            self._next(ScoringBatch(row, row + 1, inquiry=inquiry))
        elif self.control.images is not None and not control_failed:
            row = self.control.row
            self._next(ScoringBatch(row, row + 1, inquiry=inquiry, of_control=True))
        else:
            self.broken = inquiry

    def _halve(self, batch: ScoringBatch, halved: bool, failures: int) -> None:
        middle = (batch.first + batch.last) // 2
        for first, last in ((middle, batch.last), (batch.first, middle)):
            self._next(ScoringBatch(first, last, failures if last - first > 1 else 0, halved=halved))

    def lost(self, batch: ScoringBatch, to_blame: bool = False, row: int | None = None) -> None:
        """Handle the death of the worker that had the batch.

        Args:
            to_blame: the worker was scoring the batch, which did not only wait.
            row: the current image, if images are tried one by one.
        """
        deaths = batch.deaths + to_blame
        if to_blame and batch.one_by_one and row is not None:
            self._deaths_alone[row] = self._deaths_alone.get(row, 0) + 1
            if self._deaths_alone[row] < DEATHS:
                self._next(batch)
            else:
                self._drop(batch, row)
        elif deaths < DEATHS:
            self._next(replace(batch, deaths=deaths))
        elif batch.inquiry:
            self.failed(batch, "the reward worker died over it, twice")
        elif batch.one_by_one:
            self._retry_full(batch)
        elif not batch.cleared:
            self._next(replace(batch, deaths=0, one_by_one=True))
        elif batch.size > 1:  # perhaps too large for a worker's memory
            self._halve(batch, batch.halved, failures=0)
        else:
            self._drop(batch, batch.first)

    def _retry_full(self, batch: ScoringBatch) -> None:
        self._next(replace(batch, deaths=0, one_by_one=False, cleared=True))

    def _drop(self, batch: ScoringBatch, row: int) -> None:
        """Drop an image, and score those before and after it as separate batches."""
        self._dropped[row] = f"the reward worker that scored it died, {DEATHS} times over it alone"
        pieces = [(first, last) for first, last in ((batch.first, row), (row + 1, batch.last)) if first < last]
        self._next(*(ScoringBatch(first, last, halved=batch.halved) for first, last in pieces))

    def scores(self) -> Scores:
        """Return the task's scores, NaN for dropped images."""
        assert self.finished, "scores are read when all are there"
        rewards = {name: np.full(self.count, np.nan, np.float32) for name in self.names}
        for batch, scores in self._scored:
            for name, values in scores.rewards.items():
                rewards[name][batch.first : batch.last] = values
        seconds = sum((scores.seconds for _, scores in self._scored), 0.0)
        machines = frozenset().union(*(scores.machines for _, scores in self._scored))
        return Scores(rewards, seconds, dict(sorted(self._dropped.items())), machines, summed_usage(self._usage))
