"""Run work on the meta device as on a real one: autocast, fused attention, kernels' workspace, and synthetic inputs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ray_ddpo.common.diffusion.memory.live_bytes import PLAIN, Kernels

# Functions of denoising networks that torch.autocast runs in half precision, and in float32.
IN_HALF = {
    F.linear,
    torch.conv2d,
    F.conv2d,
    F.conv3d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    F.scaled_dot_product_attention,
}
IN_FLOAT32 = {"cuda": {F.group_norm, F.layer_norm, F.softmax, torch.softmax}, "cpu": set()}

BLAS_BYTES = 2 * 2**25  # cuBLAS workspaces of 32 MiB, one each for the forward and the backward thread
# Splits of deterministic fused attention's backward pass: one per multiprocessor of an H100, at least one per head.
SPLITS = 132
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class LikeDevice(TorchFunctionMode):
    """Run a network on the meta device as on `device`: with autocast to `dtype`, and with fused attention."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._device = device
        self._dtype = dtype
        self._autocast = dtype != torch.float32
        self._weights: dict[int, Tensor] = {}  # in half precision

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast and func in IN_HALF | IN_FLOAT32[self._device]:
            dtype = self._dtype if func in IN_HALF else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            inputs = (*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))
            if inputs[0].ndim == 4:  # without an axis of heads there is no fused kernel
                return FusedAttention.apply(self._device, *inputs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not (value.is_leaf and value.requires_grad and dtype == self._dtype):
            return value.to(dtype)
        if id(value) not in self._weights:  # autocast caches copies of trained weights until it ends
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]


class FusedAttention(torch.autograd.Function):
    """Attention that saves what the fused kernel saves: inputs, output and one float32 per query, never the matrix."""

    @staticmethod
    def forward(context: Any, device: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        context.device = device
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        query, key, value, *_ = context.saved_tensors
        images, heads, tokens, width = query.shape
        # The kernel accumulates the query's gradient in float32 and in deterministic order.
        sums = (math.ceil(SPLITS / (images * heads)), images, heads, tokens, 32 * math.ceil(width / 32))
        summed = query.new_empty(sums, dtype=torch.float32) if context.device == "cuda" else None
        gradient = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del summed
        return None, *gradient


class CudaKernels(Kernels):
    """cuDNN's convolutions.

    They run in channels_last if weights or input are, and copy the other tensors into that format.
    """

    def in_memory_format(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        if operation not in CONVOLUTIONS or not any(map(_is_channels_last, arguments[:3])):
            return output
        if isinstance(output, Tensor):
            return _channels_last_like(output)
        return tuple(each if each is None or each.ndim != 4 else _channels_last_like(each) for each in output)

    def scratch(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> int:
        if operation not in CONVOLUTIONS:
            return 0
        outputs = [output] if isinstance(output, Tensor) else [output[0]]
        tensors = [each for each in (*arguments[:2], *outputs) if isinstance(each, Tensor) and each.ndim == 4]
        return sum(each.nbytes for each in tensors if not each.is_contiguous(memory_format=torch.channels_last))


def _is_channels_last(value: Any) -> bool:
    """Return whether a tensor is channels_last, and not merely a shape for which both formats are equal."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return False
    return value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


def _channels_last_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.channels_last)


CUDA = CudaKernels()


def library_bytes(device: str) -> int:
    """Return the bytes that libraries allocate for themselves through torch."""
    return BLAS_BYTES if device == "cuda" else 0


def kernels_of(device: str) -> Kernels:
    """Return the device's kernels. A CPU's kernels take their workspace outside of torch's allocator."""
    return CUDA if device == "cuda" else PLAIN


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
