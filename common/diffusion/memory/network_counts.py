"""Counts that the sizes of every family share: a network with its trained parameters, on the learner and on a sampler."""

from dataclasses import dataclass
from typing import Any

from ray_ddpo.common.diffusion.lora.adapters import base_weight_bytes, trained_parameters
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.meta_device import library_bytes
from ray_ddpo.common.diffusion.memory.network_memory import Inputs, NetworkMemory
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind, count_parameters, parameter_bytes


@dataclass(frozen=True, kw_only=True)
class NetworkCounts:
    """Parameters and bytes of a network, and its memory as a sampler has it."""

    parameters: int  # without adapters
    trained: int
    learner: PeakBytes  # by the transitions of a micro-batch, with weights and optimizer state
    network_bytes: int  # the sampler's weights, with the copy that merged adapters keep
    sampler: NetworkMemory


def count_network(config: Any, network: Any, inputs: Inputs, device: DeviceKind) -> NetworkCounts:
    """Make a network trainable and count it.

    Args:
        config: the family's keys, with its adapter's keys under `lora`.
        network: on the meta device, as constructed.
        inputs: what the network is called with.
        device: the device whose memory is counted.
    """
    parameters = count_parameters(network)
    make_trainable(network, config.train, config.lora)
    trained = sum(parameter.numel() for parameter in trained_parameters(network).values())
    memory = NetworkMemory(network, inputs, config.dtype_of("learner"), device)
    # Gradient and AdamW's two optimizer states, in float32, per trained parameter.
    held = parameter_bytes(network) + 3 * 4 * trained + library_bytes(device)
    learner = memory.learning(config.gradient_checkpointing).plus(held)
    if config.train == "lora":
        memory.change_dtype(config.dtype_of("sampler"))
    # Merging adapters keeps a copy of the base weights.
    network_bytes = parameter_bytes(network) + (base_weight_bytes(network) if config.merge_adapters else 0)
    return NetworkCounts(
        parameters=parameters, trained=trained, learner=learner, network_bytes=network_bytes, sampler=memory
    )
