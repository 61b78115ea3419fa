"""The most bytes that tensors hold at once while a piece of work is done: counted operation by operation, on any device."""

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
    """What a device's kernels do beyond what operations say."""

    @abstractmethod
    def in_memory_format(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        """The output as the device's kernel lays it out."""

    @abstractmethod
    def scratch(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> int:
        """Bytes that it takes while it runs."""


class PlainKernels(Kernels):
    """Nothing beyond it."""

    def in_memory_format(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        return output

    def scratch(self, operation: Any, arguments: tuple[Any, ...], output: Any) -> int:
        return 0


PLAIN = PlainKernels()


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that come into being while it is entered: `live` now, and the `peak`.

    The work's inputs are not among them, nor is what a kernel takes and gives back by itself; `kernels` say of that.
    On the meta device nothing is computed, so a large model's step is counted in a second.
    """

    def __init__(self, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._kernels = kernels
        self._known: dict[int, int] = {}  # storages that are live: identity, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = self._kernels.in_memory_format(func, args, func(*args, **(kwargs or {})))
        made = [leaf for leaf in _tensors(output) if _identity(leaf) not in self._known]
        if made:
            # A view of what was there before the work began is not its making.
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
    """Those in an operation's arguments or output, which nest lists at most."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(work: Callable[[], object], kernels: Kernels = PLAIN) -> int:
    """The most bytes held at once while `work` is done, without those that it began with."""
    with LiveBytes(kernels) as counter:
        result = work()
    del result  # kept until here: what the work gives back is held at its end
    return counter.peak


@dataclass(frozen=True)
class PeakBytes:
    """A peak that grows with the rows of a batch along a line."""

    fixed: float | int
    each: float | int  # a row

    def of(self, batch: int) -> int:
        """The peak of so many rows."""
        return round(self.fixed + batch * self.each)

    def plus(self, fixed: float | int, each: float | int = 0) -> "PeakBytes":
        """The same with more bytes beside it."""
        return PeakBytes(self.fixed + fixed, self.each + each)

    def largest(self, bytes: float | int) -> int:
        """The most rows whose peak is not above `bytes`; 0 where not even one fits."""
        return max(0, int((bytes - self.fixed) // self.each))


def line_through(peak: Callable[[int], int], few: int, many: int) -> PeakBytes:
    """The line through the peaks of two batches."""
    least, most = peak(few), peak(many)
    each = (most - least) / (many - few)
    return PeakBytes(least - few * each, each)


def allocated_peak(work: Callable[[], object], device: str, held: int) -> float | int:
    """The most bytes allocated at once while `work` is done, with all that was before; infinite: the GPU has no more.

    On a GPU the allocator says so. Elsewhere it is counted, beside the `held` bytes of what the work begins with.
    """
    if not device.startswith("cuda"):
        return held + peak_bytes(work)
    try:
        _let_go()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return math.inf


def _let_go() -> None:
    gc.collect()  # an error's traceback holds the tensors of the frames it went through
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
