"""ClipBounds: the bounds of a clipped ratio, and the checks of the keys that they come from."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class ClipBounds:
    """The ratio's range 1 − lower … 1 + upper, and the dual clip's factor, on the scale of `log_prob`."""

    lower: float
    upper: float
    dual: float | None = None  # c > 1; None: no dual clip

    def outside(self, ratio: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return 1 for a ratio outside the range, else 0."""
        change = ratio - 1
        return ((change < -self.lower) | (change > self.upper)).float()

    def dual_clips(self, ratio: Float[Tensor, "B"], advantages: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Return the transitions whose loss is held: those with a negative advantage and a ratio above c."""
        assert self.dual is not None, "the dual clip is off"
        return (advantages < 0) & (ratio > self.dual)


def check_dual_clip(bounds: ClipBounds, key: str) -> None:
    """Check that the dual clip begins above the ratio's range.

    Args:
        bounds: on any scale.
        key: the key that gave the dual clip.

    Raises:
        ValueError: it does not, so that ratios within the range would be held.
    """
    if bounds.dual is not None and bounds.dual <= 1 + bounds.upper:
        given = bounds.dual if key == "dual_clip" else bounds.dual - 1
        least = 1 + bounds.upper if key == "dual_clip" else bounds.upper
        raise ValueError(
            f"{key} is {given:g} and the clip range above 1 ends at {least:g}: the dual clip must begin above it, so "
            f"give a larger {key}, or leave it out"
        )
