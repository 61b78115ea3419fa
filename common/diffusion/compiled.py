"""A network compiled once, for batches of one size: smaller batches are padded, larger ones split."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

# diffusers' classes of blocks that a network repeats.
REPEATED_BLOCKS = (
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "QwenImageTransformerBlock",
    "ZImageTransformerBlock",
    "Flux2TransformerBlock",
    "Flux2SingleTransformerBlock",
    "HunyuanImageTransformerBlock",
    "HunyuanImageSingleTransformerBlock",
    "Lumina2TransformerBlock",
    "SanaTransformerBlock",
    "WanTransformerBlock",
    "LTXVideoTransformerBlock",
)


@final
class CompiledNetwork:
    """A network called through `torch.compile`.

    Shapes are static: the code of a shape does not depend on shapes seen before, as it would with dynamic shapes.
    So equal batches give equal bits in every process.
    """

    def __init__(self, call: Callable[..., Tensor], rows: int, blocks: Iterable[nn.Module] = ()) -> None:
        """Compile a function of tensors by name, which have one row per batch item and always `rows` rows.

        If there are `blocks`, compile each of these modules of the network instead.
        """
        # Isolated, because torch's limit of 8 recompilations otherwise counts all networks of the process together.
        keys: dict[str, Any] = {"dynamic": False, "fullgraph": True, "isolate_recompiles": True}
        blocks = list(blocks)
        for block in blocks:
            block.compile(**keys)
        torch_compile: Any = torch.compile  # its overloads do not list isolate_recompiles yet
        self._compiled: Any = call if blocks else torch_compile(call, **keys)
        self._rows = rows

    def __call__(self, **inputs: Tensor) -> Float[Tensor, "B ..."]:
        """Return the network's output, one row per input row."""
        parts = zip(*(each.split(self._rows) for each in inputs.values()), strict=True)
        outputs = [self._run(dict(zip(inputs, part, strict=True))) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        count = len(next(iter(inputs.values())))
        if count < self._rows:
            padding = self._rows - count  # repeats the first row
            inputs = {
                name: torch.cat([rows, rows[:1].expand(padding, *rows.shape[1:])]) for name, rows in inputs.items()
            }
        return self._compiled(**inputs)[:count]


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that a diffusers network repeats.

    Raises:
        ValueError: The network has none that are known here.
    """
    found = [module for module in network.modules() if type(module).__name__ in REPEATED_BLOCKS]
    if not found:
        raise ValueError(
            f"policy.compile_blocks is true, and {type(network).__name__} has none of the blocks "
            f"{', '.join(REPEATED_BLOCKS)}: give false, which compiles the whole network"
        )
    return found


def graph_of_learning(is_compiled: bool) -> AbstractContextManager:
    """Return the gradient mode in which a pass without a loss has the same bits as a training pass.

    With gradients off, torch.compile makes other code, which rounds differently. The caller detaches what it keeps.
    """
    return torch.enable_grad() if is_compiled else torch.no_grad()
