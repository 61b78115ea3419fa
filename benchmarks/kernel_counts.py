"""Count the kernels that an eager network launches and the bytes that they move, on any device, also meta.

Rules:
- Each aten operation that writes memory is one kernel. Views, and operations that only allocate, are none.
- An operation reads its tensors once and writes its outputs once. An expanded tensor counts as the memory it has. An
  operation in place reads and writes its tensor, except copies and fills, which only write it.
- Attention is one fused kernel forward and one backward, which read and write its inputs, outputs and gradients once.
- cuDNN convolves in channels_last. A convolution of contiguous tensors transposes them inside, each read and written
  once more. These transposes are counted apart, because they are part of the convolution's operation.
- Kernels that one operation launches further, such as the three passes of a group norm, are not counted.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
CLASSES = ("conv", "mm", "attention", "norm", "elementwise", "layout copies", "casts", "other")
MATRIX_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
CONVOLUTIONS = {"convolution", "convolution_backward"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
ONLY_WRITTEN = {"copy_", "fill_", "zero_"}
COPIES = {"clone", "copy_", "_to_copy", "_reshape_copy"}


@torch.library.custom_op("kernel_counts::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for fused attention: output, and one float32 number a query for the backward pass. Runs on meta only."""
    raise NotImplementedError("this operation has shapes and no values: use the meta device")


@torch.library.custom_op("kernel_counts::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand in for the backward pass of fused attention. Runs on meta only."""
    raise NotImplementedError("this operation has shapes and no values: use the meta device")


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(gradient, *ctx.saved_tensors)


attention.register_autograd(_gradients, setup_context=_keep)


class FusedAttention(TorchFunctionMode):
    """A mode that runs attention as one operation, as on a GPU. The meta device would compute its matrix."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        return attention(*args[:3], *(kwargs[name] for name in names if name in kwargs))[0]


class KernelCounts(TorchDispatchMode):
    """Kernels and bytes of the operations while the mode is active, by class."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.transposes = 0  # inside convolutions
        self.transposed_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = list(tensors_in((args, list((kwargs or {}).values())))), list(tensors_in(output))
        name = func._schema.name.partition("::")[2]
        if not launches(func, name, inputs, outputs):
            return output
        kind = class_of(func, name, inputs, outputs)
        self.kernels[kind] += 1
        read = _read(name, args, inputs)
        self.bytes[kind] += sum(map(moved, read)) + sum(map(moved, outputs))
        if name in CONVOLUTIONS:
            given = [each for each in (*read, *outputs) if _is_transposed(each)]
            self.transposes += len(given)
            self.transposed_bytes += 2 * sum(map(moved, given))
        return output

    @property
    def total_kernels(self) -> int:
        """The kernels of all classes, without the transposes inside convolutions."""
        return sum(self.kernels.values())

    @property
    def total_bytes(self) -> int:
        """The bytes read and written by all classes, without the transposes inside convolutions."""
        return sum(self.bytes.values())


def launches(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether an operation writes memory: no view of an input, and not an allocation alone."""
    if name in ALLOCATIONS or not outputs:
        return False
    if func._schema.is_mutable:
        return True
    known = {_storage(each) for each in inputs}
    return any(_storage(each) not in known for each in outputs)


def class_of(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """Return the class of an operation."""
    if name in CONVOLUTIONS:
        return "conv"
    if name in MATRIX_PRODUCTS:
        return "mm"
    if func.namespace == "kernel_counts":
        return "attention"
    if "_norm" in name and name.startswith("native"):
        return "norm"
    if name in COPIES:
        source = inputs[-1] if name == "copy_" else inputs[0]
        return "casts" if source.dtype != outputs[0].dtype else "layout copies"
    return "elementwise" if torch.Tag.pointwise in func.tags else "other"


def _read(name: str, args: tuple[Any, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors that an operation reads."""
    if name in ONLY_WRITTEN:
        return inputs[1:]
    if name == "convolution_backward":  # the input is read for the weight's gradient, the weight for the input's
        gradient, given, weight, *_, (for_input, for_weight, _) = args
        return [gradient, *([weight] if for_input else []), *([given] if for_weight else [])]
    return inputs


def moved(tensor: Tensor) -> int:
    """Return the bytes that reading or writing a tensor moves; of an expanded one those that it has in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def tensors_in(value: Any) -> Any:
    """Yield the tensors in an operation's arguments or output, which may be nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous(memory_format=torch.channels_last)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def counted(work: Any) -> KernelCounts:
    """Return the counts of `work`, with fused attention."""
    with FusedAttention(), KernelCounts() as counts:
        work()
    return counts
