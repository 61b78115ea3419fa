"""Format numbers for readers: few digits, a minus sign, and a dash for missing values."""

import math

ABSENT = "–"
NARROW = "\u202f"  # a narrow no-break space
PLAIN = 1e4, 1e9  # between these a number has no fraction


def number(value: float | None) -> str:
    """Format with four significant digits."""
    return _typeset(value, "#.4g")


def signed(value: float | None) -> str:
    """Format a change with its sign and three significant digits."""
    return _typeset(value, "+#.3g")


def tick(value: float | None) -> str:
    """Format a round number for an axis."""
    return _typeset(value, ".4g")


def percent(share: float | None) -> str:
    """Format a share as percent."""
    return f"{100 * share:.0f}{NARROW}%" if share is not None and math.isfinite(share) else ABSENT


def duration(seconds: float) -> str:
    """Format seconds in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f}{NARROW}s"
    return f"{seconds / 60:.0f}{NARROW}min" if seconds < 7200 else f"{seconds / 3600:.1f}{NARROW}h"


def _typeset(value: float | None, digits: str) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    large = PLAIN[0] <= abs(value) < PLAIN[1]
    text = format(value, ("+" if "+" in digits else "") + ",.0f" if large else digits)
    return text.removesuffix(".").replace("-", "−")
