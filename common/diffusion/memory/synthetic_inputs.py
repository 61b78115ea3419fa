"""Synthetic conditioning for work that is only measured or tried: zeros of the shapes in a policy's sizes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Shapes = Mapping[str, tuple[int, ...]]
# Lookup functions: the position and the name of their index argument.
INDEX: dict[Any, tuple[int, str]] = {
    F.embedding: (0, "input"),
    F.one_hot: (0, "tensor"),
    torch.index_select: (2, "index"),
    Tensor.index_select: (2, "index"),
    torch.gather: (2, "index"),
    Tensor.gather: (2, "index"),
    Tensor.__getitem__: (1, ""),
}


def synthetic_conditioning(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype], rows: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return zeros with `rows` rows each, in the dtype that `dtypes` has for the name, otherwise in `dtype`."""
    return {
        name: torch.zeros(rows, *shape, device=device, dtype=dtypes.get(name, dtype)) for name, shape in shapes.items()
    }


class IntegerIndices(TorchFunctionMode):
    """Convert floating zeros that stand for class labels to integers where they index a tensor.

    A floating index is an error everywhere else, so code that works without this mode does not change under it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INDEX:
            position, keyword = INDEX[func]
            args = tuple(_as_index(value) if at == position else value for at, value in enumerate(args))
            kwargs = {name: _as_index(value) if name == keyword else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _as_index(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_index, value))
    return value.long() if isinstance(value, Tensor) and value.is_floating_point() else value
