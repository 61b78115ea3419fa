"""A network compiled for batches of one size: smaller ones are filled up, larger ones cut, so that it is compiled once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor


@final
class CompiledNetwork:
    """Calls a network through `torch.compile`.

    A shape's code depends on that shape alone (no dynamic shapes, whose code depends on which shapes came before), so equal
    batches give equal bits in every process, whatever it did before.
    """

    def __init__(self, call: Callable[..., Tensor], rows: int) -> None:
        """`call` takes tensors by name, with a row each; `rows`: of every batch that the network will see."""
        # Isolated: torch ends a process whose networks are compiled more often than its limit of 8, all of them together.
        compiler: Any = torch.compile  # whose overloads do not name the last key yet
        self._compiled: Any = compiler(call, dynamic=False, fullgraph=True, isolate_recompiles=True)
        self._rows = rows

    def __call__(self, **inputs: Tensor) -> Float[Tensor, "B ..."]:
        """The network's output for inputs with a row each."""
        parts = zip(*(each.split(self._rows) for each in inputs.values()), strict=True)
        outputs = [self._run(dict(zip(inputs, part, strict=True))) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        count = len(next(iter(inputs.values())))
        if count < self._rows:
            inputs = {name: _filled_up(value, self._rows) for name, value in inputs.items()}
        return self._compiled(**inputs)[:count]


def graph_of_learning(is_compiled: bool) -> AbstractContextManager:
    """Run a pass whose gradient nobody wants so that it has the bits of a pass that is learned from.

    A network is compiled a second time where gradients are off, and rounds otherwise there. The body detaches what it keeps.
    """
    return torch.enable_grad() if is_compiled else torch.no_grad()


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """As many rows as that, with the first again and again."""
    return torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])
