"""Which rows belong to which name, found in one pass."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def rows_by_name(names: Sequence[str]) -> dict[str, Int[np.ndarray, "n"]]:
    """The rows of each name, in order; names as they first come. Comparing every row with every name would take their product."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(of_name) for name, of_name in rows.items()}
