"""Count the floating-point operations of a network and a decoder on torch's meta device, without running them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ray_ddpo.common.diffusion.memory.meta_device import IntegerIndices, synthetic_conditioning

if TYPE_CHECKING:
    from ray_ddpo.common.diffusion.memory.network_memory import Inputs

# Forward, and forward and backward, of Stable Diffusion 1.5 with LoRA (docs/model_families.md), relative to a forward
# pass. Families that cannot be counted are taken to be like it.
ASSUMED_BOTH = 2.13


@dataclass(frozen=True, kw_only=True)
class NetworkWork:
    """Floating-point operations of a network for one row of its batch, and of decoding one image."""

    branches: int  # rows per image or transition: 2 with classifier-free guidance
    forward: int
    both: int  # forward and backward, for adapters or full fine-tuning, without re-computation
    decoding: int = 0


def count_operations(work: Callable[[], object]) -> int:
    """Return the floating-point operations of `work`: two per multiplication and addition of a matrix product."""
    with operation_counter() as counter:
        work()
    return counter.get_total_flops()


def network_work(network: Any, inputs: "Inputs") -> NetworkWork | None:
    """Count one row of a network on the meta device, whose trained parameters require gradients.

    Attention is counted in full, as its two matrix products.

    Returns:
        The work without decoding, or None if the network has no operation that can be counted.
    """
    latents = torch.empty(1, *inputs.latent_shape, device="meta")
    rows = synthetic_conditioning(inputs.conditioning_shapes, inputs.conditioning_dtypes, 1, "meta")

    def predict() -> Tensor:
        with IntegerIndices():
            return inputs.call(network, latents, torch.empty(1, device="meta"), **rows)

    with _in_float32(network):  # one dtype, so that no autocast is needed
        with torch.no_grad():
            forward = count_operations(predict)
        with torch.enable_grad():
            both = count_operations(lambda: predict().sum().backward())
    return NetworkWork(branches=inputs.branches, forward=forward, both=both) if forward and both else None


@contextmanager
def _in_float32(network: Any) -> Iterator[None]:
    """Convert a network on the meta device to float32 for the body, and drop the body's gradients."""
    dtypes = [tensor.dtype for tensor in (*network.parameters(), *network.buffers())]
    network.float()
    try:
        yield
    finally:
        network.zero_grad(set_to_none=True)
        for tensor, dtype in zip((*network.parameters(), *network.buffers()), dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def decoder_work(decoder: Callable[[Tensor], Tensor], dtype: torch.dtype, latent_shape: tuple[int, ...]) -> int:
    """Count the decoding of one image by a decoder on the meta device."""
    latents = torch.empty(1, *latent_shape, device="meta", dtype=dtype)
    with torch.no_grad():
        return count_operations(lambda: decoder(latents))


def operation_counter() -> FlopCounterMode:
    """Return torch's counter of operations, which also counts the in-place product of fused adapters."""

    def added_product(_: Any, left: Any, right: Any, *arguments: Any, **keys: Any) -> int:
        return 2 * left[0] * left[1] * right[1]  # shapes

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})
