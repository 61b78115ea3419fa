"""Statistics over images: paired comparison of two scores, and rows grouped by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

ROUNDING = 1e-6  # relative to the change; a smaller standard error is only rounding


@dataclass(frozen=True)
class PairedChange:
    """Means over the images with a finite score both times."""

    images: int
    before: float
    after: float
    error: float  # standard error of the mean paired difference
    spread: float  # standard deviation of the scores before

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def errors(self) -> float | None:
        """Return the change in standard errors; None if every image changed by the same amount."""
        return in_errors(self.change, self.error)


def in_errors(change: float, error: float) -> float | None:
    """Return a change in standard errors; None if the error is only rounding, because every image changed alike."""
    return change / error if error > ROUNDING * abs(change) else None


def paired_error(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> float:
    """Return the standard error of the mean paired difference."""
    return float((after - before).std(ddof=1) / np.sqrt(len(before)))


def paired_change(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> PairedChange | None:
    """Return the change of the mean; None if fewer than two images have a finite score both times."""
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < 2:
        return None
    old, new = before[both].astype(np.float64), after[both].astype(np.float64)
    error = paired_error(old, new)
    return PairedChange(int(both.sum()), float(old.mean()), float(new.mean()), error, float(old.std(ddof=1)))


def rows_by_name(names: Sequence[str]) -> dict[str, Int[np.ndarray, "n"]]:
    """Return the rows of each name, in order of appearance.

    A single pass, because comparing every row with every name takes quadratic time.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(of_name) for name, of_name in rows.items()}
