"""A stand-in for CUDA graphs on a CPU: each replay runs the recorded work again, and overwrites the results."""

from collections.abc import Callable

import torch
from torch import Tensor


class Rerun:
    """As a CUDA graph: results are in the same tensors after each replay, and hold nothing before the first."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        results = work()
        self.recorded += 1
        for each in results:
            each.data.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(results, work(), strict=True):
                kept.data.copy_(self.rounded(new))

        return replay, results

    def rounded(self, result: Tensor) -> Tensor:
        return result


class OtherBits(Rerun):
    """A recorder whose replays differ from an eager pass in the last bits."""

    def rounded(self, result: Tensor) -> Tensor:
        return result * (1 + 2**-20)


class Refuses(Rerun):
    """A recorder of work that cannot be recorded, as with a kernel that waits for the host."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")


class Counted:
    """A maker of recorders that knows how often they recorded and replayed."""

    def __init__(self, kind: type[Rerun] = Rerun) -> None:
        self._kind = kind
        self._made: list[Rerun] = []

    def __call__(self) -> Rerun:
        self._made.append(self._kind())
        return self._made[-1]

    @property
    def recorded(self) -> int:
        return sum(each.recorded for each in self._made)

    @property
    def replays(self) -> int:
        return sum(each.replays for each in self._made)
