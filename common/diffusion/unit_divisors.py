"""Skip divisions by 1, which diffusers' blocks compute at each of their outputs: eager torch launches a kernel for each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTES = ("output_scale_factor", "rescale_output_factor")  # of diffusers' residual blocks and attention
DIVISIONS = (Tensor.div, Tensor.true_divide, Tensor.__truediv__, torch.div, torch.true_divide)


class UnitDivisor(float):
    """The number 1 as a divisor of tensors: the quotient is the tensor itself, which x / 1.0 equals to the bit."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DIVISIONS and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return args[0]
        return func(*(float(each) if isinstance(each, cls) else each for each in args), **(kwargs or {}))


def skip_unit_divisions(network: nn.Module) -> None:
    """Let an eager network skip its divisions by 1. Outputs and gradients keep their bits."""
    _replace(network, UnitDivisor(1.0))


def compute_unit_divisions(network: nn.Module) -> None:
    """Undo `skip_unit_divisions`, for torch.compile, which removes these divisions itself."""
    _replace(network, 1.0)


def _replace(network: nn.Module, one: float) -> None:
    for module in network.modules():
        for name in ATTRIBUTES:
            if getattr(module, name, None) == 1.0:
                setattr(module, name, one)
