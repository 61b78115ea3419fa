"""Inquiry: find out after a failed batch whether the reward fails for every image or only for some of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_ddpo.actors.rewards.reward import RewardMistake

MOST_TRIED = 5  # images of a batch to try alone: if all fail, a run could not afford so many bad images


class RewardFailed(RuntimeError):
    """A reward that scored images before now fails for every image."""


@dataclass
class Control:
    """An image that was scored in this run, to distinguish a broken reward from a batch of bad images."""

    images: Any = None  # a task's images, or a reference to them; None: no image was scored yet
    row: int = 0


@dataclass(eq=False)
class Inquiry:
    """Images to try alone, those of the failed batch first. The first image that passes ends the inquiry."""

    first: int  # row of the batch
    last: int
    rows: list[int]  # rows of the task that were not tried yet
    reason: str  # why the batch failed, one line
    trace: str  # the reward's frames
    control: Control
    reasons: dict[int, str] = field(default_factory=dict)  # why images failed, by row

    @classmethod
    def into(cls, batch: tuple[int, int], rows: Sequence[int], failure: tuple[str, str], control: Control) -> "Inquiry":
        """Begin an inquiry with some of the batch's images, and others of its task if no image was ever scored.

        Args:
            batch: first row and last row, exclusive.
            rows: the task's rows that have an image.
            failure: the reason and the reward's frames.
        """
        first, last = batch
        others = [row for row in rows if not first <= row < last] if control.images is None else []
        inquiry = cls(first, last, [*spread(list(range(first, last))), *spread(others)], *failure, control)
        if last - first == 1:  # this image was tried alone already
            inquiry.rows.remove(first)
            inquiry.reasons[first] = failure[0]
        return inquiry

    @property
    def is_decided(self) -> bool:
        """Return whether every image of the batch was tried and failed."""
        return set(range(self.first, self.last)) <= self.reasons.keys()

    @property
    def reasons_in_batch(self) -> dict[int, str]:
        """Return why images of the batch failed, by row."""
        return {row: reason for row, reason in self.reasons.items() if self.first <= row < self.last}

    def error(self, title: str) -> Exception:
        """Return the error that ends the run.

        Args:
            title: the task's.
        """
        tried = f"{len(self.reasons)} of {title}"
        trace = f"\nthe reward's traceback:\n{self.trace}" if self.trace else ""
        if self.control.images is None:
            return RewardMistake(
                f"{self.reason}; so it does for every image that was tried ({tried}): correct the reward, or its service{trace}"
            )
        return RewardFailed(
            f"{self.reason}; so it does for every image that was tried ({tried}, and one that it has scored before): "
            f"once that is fixed, resume with --resume auto{trace}"
        )


def spread(rows: list[int]) -> list[int]:
    """Return at most MOST_TRIED of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= MOST_TRIED:
        return rows
    return [rows[round(index * (len(rows) - 1) / (MOST_TRIED - 1))] for index in range(MOST_TRIED)]
