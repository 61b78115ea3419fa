"""Group rows by name in one pass."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def rows_by_name(names: Sequence[str]) -> dict[str, Int[np.ndarray, "n"]]:
    """Return the rows of each name, in order of appearance.

    A single pass, because comparing every row with every name takes quadratic time.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(of_name) for name, of_name in rows.items()}
