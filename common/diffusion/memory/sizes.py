"""How large a model is and what its work takes, without loading it: counted on torch's meta device."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import nn

from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes

DeviceKind = Literal["cpu", "cuda"]

CONTEXT_BYTES = 600_000_000  # of a process on a GPU beside the allocator's: CUDA's context, and the libraries' kernels
LEFT_FREE = 0.1  # of the rest: what is allocated does not lie without gaps, and a prediction may be wrong by as much


def usable_bytes(memory: float | int, processes: int = 1) -> float:
    """What tensors may take of a GPU's memory that so many processes share."""
    return (1 - LEFT_FREE) * (memory - processes * CONTEXT_BYTES)


@dataclass(frozen=True)
class PolicySizes:
    """What `ddpo plan` multiplies. Bytes are of the dtype the recipe gives, and the most that is allocated at once."""

    __pydantic_config__: ClassVar = ConfigDict(arbitrary_types_allowed=True)  # for `sizes_cache`: torch's dtypes

    latent_shape: tuple[int, int, int]
    stochastic_steps: int  # of a path
    conditioning_shape: dict[str, tuple[int, ...]]  # of one prompt's row, by name
    conditioning_bytes: int  # of one prompt's embeddings
    network_parameters: int  # of the network that is trained, without adapters
    trained_parameters: int
    learner: PeakBytes  # by the pairs of a micro-batch, both branches of guidance, with weights and optimizer
    sampling: PeakBytes  # of a sampler, by the images of a task, with its weights
    decoding: PeakBytes
    encoding_bytes: int  # the weights that a sampler holds while it encodes prompts
    conditioning_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of what is not floating, as labels are
    network_bytes: int = 0  # of the network alone as a sampler holds it, with its weights beside merged adapters

    def sampler_bytes(self, batch: int) -> int:
        """A sampler's peak over a task of so many images."""
        return max(self.sampling.of(batch), self.decoding.of(batch), self.encoding_bytes)

    def largest_batch(self, bytes: float | int) -> int:
        """The most images of a task that a sampler can sample and decode with so many bytes; 0: not one."""
        if self.encoding_bytes > bytes:
            return 0
        return min(self.sampling.largest(bytes), self.decoding.largest(bytes))


def count_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_bytes(module: nn.Module) -> int:
    """What a module's parameters take, each in its own dtype."""
    return sum(parameter.nbytes for parameter in module.parameters())


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`; 0: there is none."""
    return next((size for size in range(min(number, most), 0, -1) if number % size == 0), 0)
