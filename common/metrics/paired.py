"""Two scores of each image, before and after: how far the mean moved, and how sure that is."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

ROUNDING = 1e-6  # of a change: below, what differs between images is rounding, and a standard error that is none


@dataclass(frozen=True)
class PairedChange:
    """Means over the images that have a finite score both times."""

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
        """The change in standard errors; None where every image changed alike."""
        return in_errors(self.change, self.error)


def in_errors(change: float, error: float) -> float | None:
    """A change in its standard errors; None where there is no error, for every image changed alike."""
    return change / error if error > ROUNDING * abs(change) else None


def paired_error(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> float:
    """Standard error of the mean of the paired differences."""
    return float((after - before).std(ddof=1) / np.sqrt(len(before)))


def paired_change(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> PairedChange | None:
    """The change of the mean; None where fewer than two images have a finite score both times."""
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < 2:
        return None
    old, new = before[both].astype(np.float64), after[both].astype(np.float64)
    error = paired_error(old, new)
    return PairedChange(int(both.sum()), float(old.mean()), float(new.mean()), error, float(old.std(ddof=1)))
