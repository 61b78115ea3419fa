"""What a run has to show beside its metrics: images with captions, tables and histograms, as plain values."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Shaped, UInt8


@dataclass(frozen=True)
class CaptionedImage:
    """An image and the text below it."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str = ""


Cell = int | float | str | CaptionedImage
Values = Shaped[np.ndarray, "N"]


@dataclass(frozen=True)
class ShownTable:
    """Rows under named columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "a row has one cell a column"


@dataclass(frozen=True)
class Media:
    """What there is to see of one round. Names are those of panels: "round", "evaluation"."""

    round: int
    images: dict[str, tuple[CaptionedImage, ...]] = field(default_factory=dict)
    tables: dict[str, ShownTable] = field(default_factory=dict)
    histograms: dict[str, Values] = field(default_factory=dict)  # values, not counted yet

    @property
    def countable(self) -> dict[str, Values]:
        """The finite values of every histogram that has some."""
        finite = {name: values[np.isfinite(values)] for name, values in self.histograms.items()}
        return {name: values for name, values in finite.items() if len(values)}
