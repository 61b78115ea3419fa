"""A network compiled for batches of one size: smaller ones are filled up, larger ones cut, so that it is compiled once."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn


@final
class CompiledNetwork:
    """Calls a network through `torch.compile`.

    A shape's code depends on that shape alone (no dynamic shapes, whose code depends on which shapes came before), so equal
    batches give equal bits in every process, whatever it did before.
    """

    def __init__(self, network: nn.Module, rows: int) -> None:
        """`rows`: of every batch that the network will see."""
        self._compiled: Any = torch.compile(network, dynamic=False, fullgraph=True)
        self._rows = rows

    def __call__(self, *inputs: Tensor) -> Float[Tensor, "B ..."]:
        """The network's output for inputs with a row each."""
        parts = zip(*(each.split(self._rows) for each in inputs), strict=True)
        outputs = [self._run(part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        count = len(inputs[0])
        if count < self._rows:
            inputs = tuple(torch.cat([each, each[:1].expand(self._rows - count, *each.shape[1:])]) for each in inputs)
        return self._compiled(*inputs, return_dict=False)[0][:count]
