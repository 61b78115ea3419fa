"""The report's images: the same prompts and noise before and after, and the reward round by round."""

from pathlib import Path
from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.common.run_storage.evaluation_log import EvaluationLog
from ray_ddpo.deploy.commands.report.lettering import Lettering, lettering

COLUMNS = 12

ImageRow = tuple[
    str, list[np.ndarray], str
]  # what is written beside it, its images [H W 3] uint8, the writing's colour


def before_after_image(comparison: Comparison, path: Path) -> None:
    """Pairs of rows: above the pretrained model's images, below the run's; the reward's change is under each pair."""
    from matplotlib import pyplot as plt

    shown = min(len(comparison.before), 3 * COLUMNS)
    rows = -(-shown // COLUMNS)
    figure, axes = plt.subplots(2 * rows, COLUMNS, figsize=(1.25 * COLUMNS, 2.9 * rows + 0.5), squeeze=False)
    change = comparison.scores_after["reward"] - comparison.scores_before["reward"]
    written = lettering([prompt.text for prompt in comparison.chosen.prompts[:shown]])
    for axis in axes.flat:
        axis.axis("off")
    for index in range(shown):
        row, column = 2 * (index // COLUMNS), index % COLUMNS
        above, below = axes[row, column], axes[row + 1, column]
        above.imshow(comparison.before[index], interpolation="nearest")
        _write_above(above, written, index)
        below.imshow(comparison.after[index], interpolation="nearest")
        below.set_title(f"{change[index]:+.2f}", fontsize=7, pad=1, color="green" if change[index] > 0 else "firebrick")
    says = "above: before · below: after, same prompt and noise, with the reward's change"
    says += " · #: the prompt stands in report.html" if any(written.numbers) else ""
    figure.suptitle(says, fontsize=10)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write_above(axis: Any, written: Lettering, index: int) -> None:
    # A prompt is no formula, whatever dollars it has.
    axis.set_title(written.texts[index][:18], fontsize=8, pad=2, parse_math=False, family=list(written.families))


def versions_image(log: EvaluationLog, shown: list[dict[str, Any]], path: Path) -> None:
    """A row a version: its kept images, with the same prompts and noise; red where there was an alarm. Without any, no file."""
    rows = [
        (
            f"version {figures['policy_version']}",
            log.images(figures["policy_version"]),
            "firebrick" if figures["alarms"] else "black",
        )
        for figures in shown
    ]
    if any(images for _, images, _ in rows):
        rows_image(rows, path)


def rows_image(rows: list[ImageRow], path: Path, prompts: list[str] | None = None) -> None:
    """Rows of images, as many in each, with the same prompts and noise in a column; `prompts` are written above them."""
    from matplotlib import pyplot as plt

    columns = len(rows[0][1])
    longest = max(len(label) for label, _, _ in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.25 * columns + 0.08 * longest, 1.25 * len(rows) + 0.2), squeeze=False
    )
    for line, (label, images, colour) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", color=colour, parse_math=False)
    written = lettering(prompts or [])
    for index, axis in enumerate(axes[0][: len(written.texts)]):
        _write_above(axis, written, index)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def reward_curve(rounds: list[dict[str, Any]], path: Path) -> None:
    """Mean reward of the images sampled for each round, with the deviation of the images as a band."""
    from matplotlib import pyplot as plt

    images = np.cumsum([metrics["images"] for metrics in rounds])
    mean = np.array([metrics["reward/mean"] for metrics in rounds])
    error = np.array([metrics["reward/std"] / np.sqrt(metrics["images"]) for metrics in rounds])
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(images, mean, marker="o", markersize=3)
    axis.fill_between(images, mean - error, mean + error, alpha=0.25, label="± one standard error of the round's mean")
    axis.set_xlabel("images drawn")
    axis.set_ylabel("reward of the images learned from")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
