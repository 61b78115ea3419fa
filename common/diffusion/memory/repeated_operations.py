"""Compute the shapes of repeated operations on the meta device once, because torch derives them in slow Python code."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that write into their first argument and keep its layout: there is no value to write on meta.
IN_PLACE = {torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default, torch.ops.aten.addmm_.default}
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class RepeatedOperations(TorchDispatchMode):
    """Remember the output's layout of each operation by its arguments, and return a new tensor of that layout.

    A network has tens of equal blocks. Operations are left alone if they write into an argument, return a view or use
    another device. Enter this mode before modes that count, so that they see every operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layouts: dict[Any, tuple[type, tuple[Layout | None, ...]] | None] = {}  # None: not to be remembered

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A new tensor without a given dtype gets torch's default.
        key = _key((args, tuple(kwargs.items()), torch.get_default_dtype())) if _is_remembered(func) else None
        if key is None:
            return func(*args, **kwargs)
        if (func, key) not in self._layouts:
            output = func(*args, **kwargs)
            self._layouts[func, key] = _layouts_of(output, args)
            return output
        if func in IN_PLACE:
            return args[0]
        found = self._layouts[func, key]
        if found is None:
            return func(*args, **kwargs)
        kind, layouts = found
        made = (layout and torch.empty_strided(*layout[:2], dtype=layout[2], device="meta") for layout in layouts)
        return next(made) if kind is Tensor else kind(made)


@functools.cache
def _is_remembered(func: Any) -> bool:
    schema = func._schema
    return func in IN_PLACE or not any(each.alias_info for each in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Any:
    """Return a hashable description of an operation's arguments; None: there is something else than meta tensors."""
    if isinstance(value, Tensor):
        if not value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
            return None
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, tuple | list):
        keys = tuple(map(_key, value))
        return None if None in keys else keys
    is_plain = value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
    is_plain = is_plain or isinstance(value, torch.layout | torch.memory_format)
    return (type(value), value) if is_plain else None  # 1, 1.0 and True are equal


def _layouts_of(output: Any, args: tuple[Any, ...]) -> tuple[type, tuple[Layout | None, ...]] | None:
    """Return the layouts of an operation's output; None if it is no new memory of its own."""
    outputs = (output,) if isinstance(output, Tensor) else output
    if not isinstance(outputs, tuple | list) or not all(each is None or isinstance(each, Tensor) for each in outputs):
        return None
    tensors = [each for each in outputs if each is not None]
    memories = {each.untyped_storage()._cdata for each in tensors}
    if len(memories) < len(tensors) or any(each.untyped_storage()._cdata in memories for each in _tensors(args)):
        return None
    layouts = tuple(each if each is None else (each.shape, each.stride(), each.dtype) for each in outputs)
    for each in tensors:
        alike = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
        if not each.is_meta or alike.untyped_storage().nbytes() != each.untyped_storage().nbytes():
            return None
    return (Tensor if isinstance(output, Tensor) else type(output)), layouts


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
