"""Media that a run shows besides its metrics: images and clips with captions, tables and histograms, as plain values."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Shaped

from ray_ddpo.common.clips import ImageOrClip


@dataclass(frozen=True)
class CaptionedImage:
    """An image or a clip with a caption."""

    pixels: ImageOrClip
    caption: str = ""
    frame_rate: float | None = None  # of a clip, in frames a second


Cell = int | float | str | CaptionedImage
Values = Shaped[np.ndarray, "N"]


@dataclass(frozen=True)
class ShownTable:
    """Rows under named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "a row has one cell per column"


@dataclass(frozen=True)
class Media:
    """The media of one round, by panel name ("round", "evaluation")."""

    round: int
    images: dict[str, tuple[CaptionedImage, ...]] = field(default_factory=dict)
    tables: dict[str, ShownTable] = field(default_factory=dict)
    histograms: dict[str, Values] = field(default_factory=dict)  # raw values, not counts

    @property
    def countable(self) -> dict[str, Values]:
        """Return the finite values of every histogram that has some."""
        finite = {name: values[np.isfinite(values)] for name, values in self.histograms.items()}
        return {name: values for name, values in finite.items() if len(values)}
