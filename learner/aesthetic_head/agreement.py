"""How well predicted ratings agree with true ones: MSE, and the correlation of values (PLCC) and of ranks (SRCC)."""

import numpy as np
from jaxtyping import Float


def average_ranks(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def pearson(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float | None:
    """The correlation of values; None where one of them does not vary."""
    one, other = first - first.mean(), second - second.mean()
    length = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / length) if length > 0 else None


def spearman(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float | None:
    """The correlation of ranks, with average ranks for ties; None where one of them does not vary."""
    return pearson(average_ranks(first), average_ranks(second))


def agreement(predicted: Float[np.ndarray, "N"], true: Float[np.ndarray, "N"]) -> dict[str, int | float | None]:
    """The figures of one split. `mse_of_mean` is that of saying the mean of these ratings of every image: their variance."""
    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    if len(true) == 0:
        return {"images": 0, "mse": None, "mse_of_mean": None, "srcc": None, "plcc": None}
    return {
        "images": len(true),
        "mse": float(np.square(predicted - true).mean()),
        "mse_of_mean": float(true.var()),
        "srcc": spearman(predicted, true),
        "plcc": pearson(predicted, true),
    }
