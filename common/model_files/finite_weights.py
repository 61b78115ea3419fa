"""Refuse non-finite weights, by file and tensor, wherever weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def first_not_finite(arrays: Mapping[str, Any]) -> str | None:
    """Return the name of the first array or tensor with a NaN or infinity; None if all are finite."""
    return next((name for name, array in arrays.items() if not _is_finite(array)), None)


def refuse_not_finite(file: str | Path, arrays: Mapping[str, Any]) -> None:
    """Raise ValueError if an array or tensor of `file` is not finite."""
    if name := first_not_finite(arrays):
        count = sum(not _is_finite(array) for array in arrays.values())
        raise ValueError(
            f"{file}: the tensor {name} holds NaN or infinity ({count} of {len(arrays)} do), so these weights are of no use: "
            "restore the file, or take an earlier checkpoint's weights (--from RUN@ROUND)"
        )


def _is_finite(array: Any) -> bool:
    if not isinstance(array, np.ndarray):
        small = array.is_floating_point() and array.dtype.itemsize == 1  # float8 has no isfinite
        return bool((array.float() if small else array).isfinite().all())
    return array.dtype.kind not in "fcV" or bool(np.isfinite(array).all())
