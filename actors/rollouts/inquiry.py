"""Inquiry: after a batch has failed, whether the reward is broken for every image or only for some of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_ddpo.actors.rewards.reward import RewardMistake

MOST_TRIED = 5  # images of a batch that are tried alone: if all of them fail, a run could not afford as many bad ones


class RewardFailed(RuntimeError):
    """A reward that has scored images before fails for every image now."""


@dataclass
class Control:
    """An image that was scored in this run, to tell a broken reward from a batch of bad images."""

    images: Any = None  # the task's, or a reference to them; None: no image was scored yet
    row: int = 0


@dataclass(eq=False)
class Inquiry:
    """Images are tried alone, the failed batch's own first; the first that passes ends the inquiry."""

    first: int  # of the batch
    last: int
    rows: list[int]  # of the task, still to be tried
    reason: str  # of the batch's failure, one line
    trace: str  # the reward's own frames
    control: Control
    reasons: dict[int, str] = field(default_factory=dict)  # of the images that failed, by row

    @classmethod
    def into(cls, batch: tuple[int, int], rows: Sequence[int], failure: tuple[str, str], control: Control) -> "Inquiry":
        """Begin with some of the batch's images. Images of its task come next where none was ever scored to compare with.

        `rows`: those of the task that have an image.
        """
        first, last = batch
        others = [row for row in rows if not first <= row < last] if control.images is None else []
        inquiry = cls(first, last, [*spread(list(range(first, last))), *spread(others)], *failure, control)
        if last - first == 1:  # it was tried alone already
            inquiry.rows.remove(first)
            inquiry.reasons[first] = failure[0]
        return inquiry

    @property
    def is_decided(self) -> bool:
        """Return whether every image of the batch was tried, and failed."""
        return set(range(self.first, self.last)) <= self.reasons.keys()

    @property
    def reasons_in_batch(self) -> dict[int, str]:
        """Return why each image of the batch failed that was tried."""
        return {row: reason for row, reason in self.reasons.items() if self.first <= row < self.last}

    def error(self, title: str) -> Exception:
        """Return what ends the run. `title`: the task's."""
        tried = f"{len(self.reasons)} of {title}"
        trace = f"\nthe reward's traceback:\n{self.trace}" if self.trace else ""
        if self.control.images is None:
            return RewardMistake(
                f"{self.reason}; so it does for every image that was tried ({tried}): correct it{trace}"
            )
        return RewardFailed(
            f"{self.reason}; so it does for every image that was tried ({tried}, and one that it has scored before): "
            f"once that is mended, go on with --resume auto{trace}"
        )


def spread(rows: list[int]) -> list[int]:
    """Return at most MOST_TRIED of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= MOST_TRIED:
        return rows
    return [rows[round(place * (len(rows) - 1) / (MOST_TRIED - 1))] for place in range(MOST_TRIED)]
