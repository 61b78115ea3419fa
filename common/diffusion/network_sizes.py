"""The sizes of a family with one network, counted on the meta device. Families of the user's own may call it too."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.memory.live_bytes import line_through, peak_bytes
from ray_ddpo.common.diffusion.memory.meta_device import library_bytes
from ray_ddpo.common.diffusion.memory.network_memory import Inputs, count_network
from ray_ddpo.common.diffusion.memory.repeated_operations import RepeatedOperations
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, PolicySizes
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES


def network_sizes(
    config: PolicyConfig,
    network: Any,
    inputs: Inputs,
    sampling: SamplingTable,
    device: DeviceKind,
    decode: Callable[[Tensor], Tensor],
) -> PolicySizes:
    """Return what `ddpo plan` needs to know of a family with one network.

    Args:
        config: the family's keys, with its adapter's keys under `lora`.
        network: on the meta device, as constructed.
        inputs: what the network is called with. The `negative_…` inputs have the same shapes and are added.
        sampling: the recipe's `[sampling]`.
        device: the device whose memory is counted.
        decode: makes images from latents, without a network.
    """
    with RepeatedOperations():
        counts = count_network(config, network, inputs, device)
    held = counts.network_bytes + library_bytes(device)
    trajectory = DTYPES[sampling.latents_dtype].itemsize * (sampling.num_steps + 1) * math.prod(inputs.latent_shape)

    def decoded(images: int) -> int:
        return peak_bytes(lambda: decode(torch.empty(images, *inputs.latent_shape, device="meta")))

    shapes, dtypes = inputs.conditioning_shapes, inputs.conditioning_dtypes
    row_bytes = (math.prod(shape) * dtypes.get(name, torch.float32).itemsize for name, shape in shapes.items())
    return PolicySizes(
        latent_shape=inputs.latent_shape,
        stochastic_steps=config.stochastic_steps(sampling),
        conditioning_shape=shapes | {f"negative_{name}": shape for name, shape in shapes.items()},
        conditioning_bytes=sum(row_bytes),
        network_parameters=counts.parameters,
        trained_parameters=counts.trained,
        learner=counts.learner,
        sampling=counts.sampler.sampling().plus(held, 3 * trajectory),
        decoding=line_through(decoded, 1, 2).plus(held, trajectory),
        encoding_bytes=held,
        conditioning_dtypes=dtypes | {f"negative_{name}": dtype for name, dtype in dtypes.items()},
        network_bytes=counts.network_bytes,
        work=counts.work,
        units=counts.units,
    )
