"""Measure the peak memory of a piece of work, operation by operation and on any device, including meta."""

import gc
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(ABC):
    """Memory format and workspace of a device's kernels, which the operations themselves do not show."""

    @abstractmethod
    def in_memory_format(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        """Return the output in the memory format that the device's kernel writes."""

    @abstractmethod
    def scratch(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> int:
        """Return the bytes of workspace that the kernel takes while it runs."""


class PlainKernels(Kernels):
    """Kernels without special memory formats or workspace."""

    def in_memory_format(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        return output

    def scratch(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> int:
        return 0


PLAIN = PlainKernels()


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors created while the mode is active: `live` now, and the `peak`.

    The work's inputs do not count. Workspace inside a kernel counts only as far as `kernels` tells. On the meta device
    nothing is computed, so a step of a large model is counted in a second.
    """

    def __init__(self, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._kernels = kernels
        self._known: dict[int, int] = {}  # live storages: identity → bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = self._kernels.in_memory_format(func, args, func(*args, **(kwargs or {})))
        made = [leaf for leaf in _tensors(output) if _identity(leaf) not in self._known]
        if made:
            # Do not count views of tensors that existed before the work began.
            before = {_identity(leaf) for leaf in _tensors(args)}
            for leaf in made:
                if _identity(leaf) not in before:
                    self._keep(leaf)
        self.peak = max(self.peak, self.live + self._kernels.scratch(func, args, output))
        return output

    def _keep(self, tensor: Tensor) -> None:
        storage, identity = tensor.untyped_storage(), _identity(tensor)
        self._known[identity] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, identity)

    def _release(self, identity: int) -> None:
        self.live -= self._known.pop(identity)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an operation's arguments or output, which may be nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(work: Callable[[], object], kernels: Kernels = PLAIN) -> int:
    """Return the peak of live bytes while `work` runs, without the tensors that existed before."""
    with LiveBytes(kernels) as counter:
        result = work()
    del result  # the caller would still hold the result at the end of the work
    return counter.peak


@dataclass(frozen=True)
class PeakBytes:
    """A peak that grows linearly with the rows of a batch."""

    fixed: float | int
    each: float | int  # per row

    def of(self, batch: int) -> int:
        """Return the peak for a batch of this size."""
        return round(self.fixed + batch * self.each)

    def plus(self, fixed: float | int, each: float | int = 0) -> "PeakBytes":
        """Return the same line with more bytes added."""
        return PeakBytes(self.fixed + fixed, self.each + each)

    def largest(self, limit: float | int) -> int:
        """Return the largest batch whose peak is at most `limit`; 0 if not even one row fits."""
        return max(0, int((limit - self.fixed) // self.each))


def line_through(peak: Callable[[int], int], few: int, many: int) -> PeakBytes:
    """Return the line through the peaks of two batch sizes."""
    least, most = peak(few), peak(many)
    each = (most - least) / (many - few)
    return PeakBytes(least - few * each, each)


def allocated_peak(work: Callable[[], object], device: str, held: int) -> float | int:
    """Return the peak of allocated bytes while `work` runs, including memory held before; infinite if the GPU runs out.

    On a GPU the allocator tells. Elsewhere the peak is counted, and added to the `held` bytes of the work's inputs.
    """
    if not device.startswith("cuda"):
        return held + peak_bytes(work)
    try:
        gc.collect()  # an earlier error's traceback may still hold tensors
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return math.inf
