"""Describe a tensor in one line, and check its shape, dtype and finiteness."""

from typing import Any

import torch
from torch import Tensor


def refuse_unless(holds: Any, found: str, expected: str) -> None:
    """Raise ValueError with what was found and what is expected, unless the condition holds."""
    if not holds:
        raise ValueError(f"{found}: expected {expected}")


def check_tensor(found: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """Return a finite tensor of this shape and dtype, or any floating one. Raise ValueError if it is anything else."""
    kind = "floating numbers" if dtype is None else _name(dtype)
    fits = isinstance(value, Tensor) and tuple(value.shape) == shape
    fits = fits and (value.is_floating_point() if dtype is None else value.dtype == dtype)
    expected = f"{kind} of shape {shape}, all finite"
    refuse_unless(fits and bool(value.isfinite().all()), f"{found} {described(value)}", expected)
    return value


def described(value: Any) -> str:
    """Return a tensor's dtype, shape, range and number of non-finite elements; of other values, the type."""
    if not isinstance(value, Tensor):
        kind = "None" if value is None else type(value).__name__
        return f"{kind} {value!r}" if isinstance(value, (str, int, float)) else kind
    text = f"{_name(value.dtype)} of shape {tuple(value.shape)}"
    finite = value[value.isfinite()] if value.numel() else value
    broken = value.numel() - finite.numel()
    if broken:
        return f"{text}, {broken} of {value.numel()} not finite"
    if not value.numel() or value.dtype == torch.bool or value.is_complex():
        return text
    return f"{text}, from {value.min().item():.4g} to {value.max().item():.4g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
