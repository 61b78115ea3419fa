"""A model's size and the memory of its work, without loading it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import nn

from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.network_work import NetworkWork
from ray_ddpo.common.diffusion.units import parameters_by_unit

DeviceKind = Literal["cpu", "cuda"]

CONTEXT_BYTES = 600_000_000  # per GPU process, outside of the allocator: CUDA context and the libraries' kernels
LEFT_FREE = 0.1  # of the rest, for fragmentation and for prediction errors of that size


def usable_bytes(memory: float | int, processes: int = 1) -> float:
    """Return the bytes that tensors may take of a GPU's memory if `processes` share it."""
    return (1 - LEFT_FREE) * (memory - processes * CONTEXT_BYTES)


@dataclass(frozen=True)
class UnitBytes:
    """Bytes of the learner's network as a rank gathers it block by block. All are 0 if the blocks are not known."""

    weights: int = 0  # of all parameters, in the learner's dtypes
    largest: int = 0  # the block with the most bytes
    largest_gradients: int = 0  # the most bytes of gradients that a block has
    # Copies in half precision that autocast keeps of all weights during a pass, and only of a block's if sharded.
    cached: int = 0

    @property
    def gathered(self) -> int:
        """Return the most bytes that a rank gathers at a time.

        These are two blocks, since the next one is gathered while one computes, the buffer that the second arrives in,
        and a block's gradients, with the buffer that they are summed in.
        """
        return 3 * self.largest + 2 * self.largest_gradients


@dataclass(frozen=True)
class PolicySizes:
    """Sizes of a policy for `ddpo plan`. Bytes are for the recipe's dtype, and peaks of allocated memory."""

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)  # for `sizes_cache`: torch's dtypes

    latent_shape: tuple[int, ...]  # C, H, W, or C, F, H, W
    stochastic_steps: int  # per trajectory
    conditioning_shape: dict[str, tuple[int, ...]]  # one prompt's row, by name
    conditioning_bytes: int  # one prompt's embeddings
    network_parameters: int  # the trained network, without adapters
    trained_parameters: int
    learner: PeakBytes  # by transitions of a micro-batch (both guidance branches), with weights and optimizer state
    sampling: PeakBytes  # a sampler's, by images of a task, with its weights
    decoding: PeakBytes
    encoding_bytes: int  # the weights that a sampler holds while it encodes prompts
    conditioning_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of conditioning that is not floating
    network_bytes: int = 0  # the sampler's network alone, with the copy of base weights if adapters are merged
    work: NetworkWork | None = None  # operations of a row and of decoding; None: not counted
    units: UnitBytes = UnitBytes()  # the learner's network by its blocks
    # Decoding with gradients of the latents, by images, without the decoder's weights; None: not counted.
    decoding_gradient: PeakBytes | None = None
    decoder_bytes: int = 0  # the decoder's weights

    def sampler_bytes(self, batch: int) -> int:
        """Return a sampler's peak for a task of `batch` images."""
        return max(self.sampling.of(batch), self.decoding.of(batch), self.encoding_bytes)

    def largest_batch(self, limit: float | int) -> int:
        """Return the most images per task that a sampler can sample and decode within `limit` bytes; 0 if none fits."""
        if self.encoding_bytes > limit:
            return 0
        return min(self.sampling.largest(limit), self.decoding.largest(limit))


def unit_bytes(network: nn.Module) -> UnitBytes:
    """Return the bytes of a network's blocks, whose trained parameters have gradients."""
    units = parameters_by_unit(network)
    return UnitBytes(
        weights=parameter_bytes(network),
        largest=max(sum(each.nbytes for each in unit) for unit in units),
        largest_gradients=max(sum(each.nbytes for each in unit if each.requires_grad) for unit in units),
    )


def count_parameters(module: nn.Module) -> int:
    """Return the number of elements in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, each in its own dtype."""
    return sum(parameter.nbytes for parameter in module.parameters())


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`; 0 if there is none."""
    return next((size for size in range(min(number, most), 0, -1) if number % size == 0), 0)
