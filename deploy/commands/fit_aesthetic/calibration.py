"""Calibration chart of an aesthetic head: predicted against true ratings."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.learner.aesthetic_head.agreement import agreement

MOST_BINS, LEAST_IN_BIN = 10, 8
BLUE, ORANGE = "#3465a4", "#e8743b"


def calibration_bins(
    predicted: Float[np.ndarray, "N"], true: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Bin two or more images by prediction: at most ten bins, of at least eight images if there are enough.

    Returns:
        Means of the predicted and of the true ratings by bin, and the standard errors of the latter.
    """
    order = np.argsort(predicted, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // LEAST_IN_BIN, 1, MOST_BINS)))
    predicted_means, true_means = (np.array([each[rows].mean() for rows in bins]) for each in (predicted, true))
    return predicted_means, true_means, np.array([true[rows].std(ddof=1) / np.sqrt(len(rows)) for rows in bins])


def calibration_chart(predicted: np.ndarray, true: np.ndarray, split: str) -> bytes:
    """Plot a PNG: images as dots, bins with one standard error, the diagonal, and both distributions at the edges."""
    from matplotlib import pyplot as plt

    predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    low, high = (float(edge) for edge in np.quantile(np.concatenate([predicted, true]), (0, 1)))
    margin = 0.04 * max(high - low, 1e-6)
    limits = (low - margin, high + margin)
    figure, axes = plt.subplots(
        2,
        2,
        figsize=(6.6, 6.6),
        width_ratios=(5, 1),
        height_ratios=(1, 5),
        gridspec_kw={"hspace": 0.04, "wspace": 0.04},
    )
    _plot_ratings(axes[1, 0], predicted, true, limits)
    edges = np.linspace(*limits, int(np.clip(len(true) // 5, 14, 40)) + 1)
    axes[0, 0].hist(predicted, edges, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.6)
    axes[1, 1].hist(true, edges, color=ORANGE, alpha=0.75, edgecolor="white", linewidth=0.6, orientation="horizontal")
    axes[0, 0].set(xlim=limits)
    axes[1, 1].set(ylim=limits)
    for axis in (axes[0, 0], axes[1, 1], axes[0, 1]):
        axis.axis("off")
    known = {name: value for name, value in agreement(predicted, true).items() if name in ("srcc", "plcc") and value}
    measured = "".join(f" · {name.upper()} {value:.3f}" for name, value in known.items())
    axes[0, 0].set_title(f"{len(true):,} {split} images{measured}", fontsize=11, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _plot_ratings(axis: Any, predicted: np.ndarray, true: np.ndarray, limits: tuple[float, float]) -> None:
    """Plot images, bins and diagonal."""
    alpha = float(np.clip(60 / len(true), 0.04, 0.45))
    axis.plot(limits, limits, color="0.55", linewidth=1, linestyle="--", zorder=1, label="predicted = true")
    axis.scatter(predicted, true, s=14, color=BLUE, alpha=alpha, linewidths=0, zorder=2, label="an image")
    axis.errorbar(
        *calibration_bins(predicted, true),
        color=ORANGE,
        marker="o",
        markersize=6,
        markeredgecolor="white",
        linewidth=1.6,
        capsize=3,
        zorder=3,
        label="mean of a bin ± standard error",
    )
    axis.set(xlim=limits, ylim=limits, xlabel="predicted rating", ylabel="true rating")
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    for handle in axis.legend(fontsize=8, loc="upper left", framealpha=0.9).legend_handles:
        handle.set_alpha(1)
