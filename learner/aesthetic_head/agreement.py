"""Agreement of predicted and true ratings: MSE, and the correlation of values (PLCC) and of ranks (SRCC)."""

import numpy as np
from jaxtyping import Float


def average_ranks(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Return ranks from 1; equal values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def pearson(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float | None:
    """Return the correlation of values, or None if one of them is constant."""
    one, other = first - first.mean(), second - second.mean()
    length = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / length) if length > 0 else None


def spearman(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> float | None:
    """Return the correlation of ranks, with average ranks for ties, or None if one of them is constant."""
    return pearson(average_ranks(first), average_ranks(second))


def agreement(predicted: Float[np.ndarray, "N"], true: Float[np.ndarray, "N"]) -> dict[str, int | float | None]:
    """Return the statistics of one split.

    `mse_of_mean` is the MSE of predicting the mean rating for every image, so the variance of the ratings.
    """
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
