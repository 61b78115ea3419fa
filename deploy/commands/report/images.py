"""Images of the report: the same prompts and noise before and after, versions one below another, and the reward curve.

Prompts are written with the fonts of this machine, or as a number if no font has their letters; never as boxes.
"""

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ray_ddpo.common.clips import ImageOrClip, are_clips, poster, posters
from ray_ddpo.common.input_images import CONTENT, IMAGE, read_inputs
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import EvalComparison

COLUMNS = 12
TINT = (255, 0, 255)  # where an input image may change
MOST_FONTS = 3  # beside the default font
PLACEHOLDERS = (
    "last resort",
    "lastresort",
    "adobe blank",
    "color emoji",
)  # fonts that cover characters without shapes for them
VARIATIONS = str.maketrans("", "", "\ufe0e\ufe0f")  # ask for an emoji's other form, which no outline font has
SHAPED_SINCE = (3, 11)  # of matplotlib: before it, letters stand one by one from left to right

LINE = 18  # letters that fit above an image

ImageRow = tuple[str, list[ImageOrClip], str]  # label, images, the label's color


@dataclass(frozen=True)
class Lettering:
    """Text to write for each prompt, and the fonts to write it with."""

    texts: tuple[str, ...]  # the prompt in one line, or its number such as #1
    families: tuple[str, ...]  # the default font first
    numbers: tuple[str, ...]  # the number of each prompt that no font can write; else empty


def before_after_image(comparison: EvalComparison, path: Path) -> None:
    """Plot pairs of rows: the pretrained model's images above, the run's below, and the change of the reward.

    If the model edits, a row of the input images stands above each pair. Clips are shown by their posters.
    """
    from matplotlib import pyplot as plt

    shown = min(len(comparison.before), 3 * COLUMNS)
    rows = -(-shown // COLUMNS)
    inputs = [shown_inputs(comparison, index) for index in range(shown)]
    tall = 3 if any(inputs) else 2
    size = (1.25 * COLUMNS, 1.45 * tall * rows + 0.5)
    figure, axes = plt.subplots(tall * rows, COLUMNS, figsize=size, squeeze=False)
    before, after = posters(comparison.before[:shown]), posters(comparison.after[:shown])
    change = comparison.scores_after["reward"] - comparison.scores_before["reward"]
    written = lettering([prompt.text for prompt in comparison.chosen.prompts[:shown]])
    for axis in axes.flat:
        axis.axis("off")
    for index in range(shown):
        row, column = tall * (index // COLUMNS), index % COLUMNS
        *over, above, below = axes[row : row + tall, column]
        above.imshow(before[index], interpolation="nearest")
        if over and inputs[index]:
            over[0].imshow(np.concatenate(inputs[index], axis=1), interpolation="nearest")
        _write_above(over[0] if over else above, written, index)
        below.imshow(after[index], interpolation="nearest")
        below.set_title(f"{change[index]:+.2f}", fontsize=7, pad=1, color="green" if change[index] > 0 else "firebrick")
    says = "above: before · below: after, same prompt and noise, with the reward's change"
    says = f"top: input · {says}" if tall > 2 else says
    says += " · the middle frame of each clip" if are_clips(comparison.before) else ""
    says += " · #: the prompt stands in report.html" if any(written.numbers) else ""
    figure.suptitle(says, fontsize=10)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shown_inputs(comparison: EvalComparison, index: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Return the input images of a held-out prompt, the first tinted where its mask lets it change; empty if none."""
    about = comparison.chosen.prompts[index].metadata
    if IMAGE + CONTENT not in about:
        return []
    height, width = comparison.before[index].shape[-3:-1]
    inputs = read_inputs([about], (height, width))
    tint, (pixels, *further) = np.array(TINT, np.uint8), inputs.images[0]
    return [np.where(inputs.masks[0][..., None], pixels // 2 + tint // 2, pixels), *further]


def _write_above(axis: Any, written: Lettering, index: int) -> None:
    # parse_math=False: a prompt may have dollar signs, and is no formula.
    title = in_two_lines(written.texts[index])
    axis.set_title(title, fontsize=8, pad=2, parse_math=False, family=list(written.families))


def in_two_lines(text: str) -> str:
    """Return a text in at most two lines of 18 letters, with an ellipsis if it is longer."""
    return "\n".join(textwrap.wrap(text, LINE, max_lines=2, placeholder="…"))


def versions_image(log: EvalLog, shown: list[dict[str, Any]], path: Path) -> None:
    """Plot one row a version with its saved images, labeled red if there was an alarm; write no file without images."""
    rows = [
        (
            f"version {entry['policy_version']}",
            log.images(entry["policy_version"]),
            "firebrick" if entry["alarms"] else "black",
        )
        for entry in shown
    ]
    if any(images for _, images, _ in rows):
        rows_image(rows, path)


def rows_image(rows: list[ImageRow], path: Path, prompts: list[str] | None = None) -> None:
    """Plot rows of equally many images, or posters of clips.

    A column shares prompt and noise; `prompts` are written above the columns.
    """
    from matplotlib import pyplot as plt

    columns = len(rows[0][1])
    longest = max(len(label) for label, _, _ in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.25 * columns + 0.08 * longest, 1.25 * len(rows) + 0.2), squeeze=False
    )
    for line, (label, images, color) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(poster(image), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", color=color, parse_math=False)
    written = lettering(prompts or [])
    for index, axis in enumerate(axes[0][: len(written.texts)]):
        _write_above(axis, written, index)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def reward_curve(rounds: list[dict[str, Any]], path: Path, made: str = "images") -> None:
    """Plot the mean reward of what each round made, images or clips, with a band of one standard error."""
    from matplotlib import pyplot as plt

    images = np.cumsum([metrics["images"] for metrics in rounds])
    mean = np.array([metrics["reward/mean"] for metrics in rounds])
    error = np.array([metrics["reward/std"] / np.sqrt(metrics["images"]) for metrics in rounds])
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(images, mean, marker="o", markersize=3)
    axis.fill_between(images, mean - error, mean + error, alpha=0.25, label="± one standard error of the round's mean")
    axis.set_xlabel(f"{made} sampled")
    axis.set_ylabel(f"reward of the training {made}")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def lettering(prompts: Sequence[str]) -> Lettering:
    """Choose fonts for the prompts, and replace prompts that this machine cannot write by numbers."""
    import matplotlib
    from matplotlib import font_manager

    lines = [" ".join(prompt.translate(VARIATIONS).split()) for prompt in prompts]
    wanted = {letter for line in lines for letter in line if not letter.isspace()}
    usual = font_manager.FontProperties().get_name()
    there, families = _letters(font_manager.findfont(usual)), [usual]
    for _ in range(MOST_FONTS):
        if not wanted - there:
            break
        best = max(_fonts(), key=lambda font: (len(font[1] & (wanted - there)), font[0]), default=("", set()))
        if not best[1] & (wanted - there):
            break
        families.append(best[0])
        there |= best[1]
    shaped = matplotlib.__version_info__[:2] >= SHAPED_SINCE

    def readable(line: str) -> bool:
        letters = {letter for letter in line if not letter.isspace()}
        return letters <= there and (shaped or not any(map(_needs_shaping, line)))

    numbers = tuple("" if readable(line) else f"#{index}" for index, line in enumerate(lines, start=1))
    return Lettering(
        tuple(number or line for number, line in zip(numbers, lines, strict=True)), tuple(families), numbers
    )


def _needs_shaping(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mn", "Mc", "Cf")


def _fonts() -> Iterator[tuple[str, set[str]]]:
    """Yield the upright fonts of this machine with their letters."""
    from matplotlib.font_manager import fontManager

    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        plain = entry.style == "normal" and Path(entry.fname).is_file()
        if plain and not any(name in entry.name.lower() for name in PLACEHOLDERS):
            yield entry.name, _letters(entry.fname)


def _letters(file: str) -> set[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(map(chr, FT2Font(file).get_charmap()))
    except (RuntimeError, OSError):  # matplotlib cannot read a bitmap font, for example
        return set()
