"""Predict the peak memory of a learner's step, a sampler's forward pass and a decoding, on the meta device."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_ddpo.common.diffusion.lora.adapters import (
    adapted_layers,
    base_weight_bytes,
    trained_parameters,
    unfused_layers,
)
from ray_ddpo.common.diffusion.lora.start import make_trainable
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes, line_through, peak_bytes
from ray_ddpo.common.diffusion.memory.meta_device import (
    IntegerIndices,
    LikeDevice,
    kernels_of,
    library_bytes,
    synthetic_conditioning,
)
from ray_ddpo.common.diffusion.memory.network_work import NetworkWork, network_work
from ray_ddpo.common.diffusion.memory.sizes import (
    DeviceKind,
    UnitBytes,
    count_parameters,
    parameter_bytes,
    unit_bytes,
)
from ray_ddpo.common.diffusion.network_storage import network_format, store_in_dtype
from ray_ddpo.common.diffusion.unit_divisors import skip_unit_divisions

BATCHES = (1, 2)  # the peak is linear in the batch size, so two points suffice


@dataclass(frozen=True)
class Inputs:
    """Inputs of a call of the network, one row each."""

    call: Callable[..., Tensor]  # (network, latents, timesteps, **rows of conditioning) → output
    latent_shape: tuple[int, ...]
    conditioning_shapes: dict[str, tuple[int, ...]]
    branches: int  # rows per image
    conditioning_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of inputs that are not floating


class NetworkMemory:
    """A network on the meta device with its trained parameters, as it works on a device."""

    def __init__(self, network: Any, inputs: Inputs, dtype: torch.dtype, device: DeviceKind) -> None:
        self._network = network
        self._inputs = inputs
        self._dtype = dtype
        self._device: DeviceKind = device
        self._has_adapters = bool(adapted_layers(network))  # otherwise autocast is around the full network
        self._stored: list[nn.Parameter] = []  # weights in another dtype than they compute in
        for layer in unfused_layers(network):
            self._autocast_alone(layer)

    def _autocast_alone(self, layer: Any) -> None:
        """Run one adapted layer under autocast, as `compute_adapters_in` does on a real device."""
        forward, layer.cast_input_dtype_enabled = layer.forward, False

        def in_half(*args: Any, **keys: Any) -> Tensor:
            with LikeDevice(self._device, self._dtype):
                return forward(*args, **keys)

        layer.forward = in_half

    def _like_device(self) -> LikeDevice:
        return LikeDevice(self._device, torch.float32 if self._has_adapters else self._dtype)

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Convert the frozen parameters to `dtype`, as samplers may have them."""
        self._dtype = dtype
        for parameter in self._network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def use_format(self, is_compiled: bool) -> None:
        """Store the network in the memory format that a role has, by whether it is compiled."""
        self._network.to(memory_format=network_format(self._device, is_compiled, len(self._inputs.latent_shape) > 3))

    def store_layers_in(self, dtype: torch.dtype) -> None:
        """Store the frozen weights of the network's layers in `dtype`, and convert each layer while it computes."""
        self._network.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=self._dtype)
        self._stored = [parameter for parameter in self._network.parameters() if parameter.dtype == dtype]

    def learning(self, checkpointing: bool) -> PeakBytes:
        """Return the peak of an optimizer step by transitions, without weights, gradients and optimizer state."""
        for parameter in self._network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with _checkpointing(self._network, self._recomputed) if checkpointing else contextlib.nullcontext():
            return self._line(self._learn)

    def sampling(self) -> PeakBytes:
        """Return the peak of a denoising step without gradient by images, without the weights."""
        return self._line(self._sample).plus(-sum(parameter.nbytes for parameter in self._stored))

    def decoding(self, decoder: Callable[[Tensor], Tensor], dtype: torch.dtype, one_by_one: bool = False) -> PeakBytes:
        """Return the peak of decoding latents of a dtype to images by images, without the decoder's weights."""

        def decode(images: int) -> None:
            pieces = [1] * images if one_by_one else [images]
            with torch.no_grad(), LikeDevice(self._device, torch.float32):  # the decoder runs in its own dtype
                torch.cat([pixels(rows) for rows in pieces])

        def pixels(rows: int) -> Tensor:
            scaled = torch.empty(rows, *self._inputs.latent_shape, device="meta", dtype=dtype) / 1.0
            return ((decoder(scaled).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

        return self._line(decode)

    def decoding_gradient(self, decoder: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PeakBytes:
        """Return the peak of decoding latents and of the backward pass to them.

        The decoder's weights, which require no gradients, are not counted.
        """

        def decode(images: int) -> None:
            with torch.enable_grad(), LikeDevice(self._device, torch.float32):
                latents = torch.empty(images, *self._inputs.latent_shape, device="meta", requires_grad=True)
                pixels = decoder((latents / 1.0).to(dtype))
                torch.autograd.backward((pixels.float() / 2 + 0.5).clamp(0, 1).sum())

        return self._line(decode)

    def _line(self, work: Callable[[int], None]) -> PeakBytes:
        return line_through(lambda rows: peak_bytes(lambda: work(rows), kernels_of(self._device)), *BATCHES)

    def _learn(self, transitions: int) -> None:
        with self._like_device():
            predicted = self._predict(transitions)
            torch.autograd.backward((predicted - torch.empty_like(predicted)).square().mean())

    def _sample(self, images: int) -> None:
        # A conversion back makes new weights. So let the peak have all of them, which `sampling` subtracts.
        for parameter in self._stored:
            parameter.data = parameter.data.clone()
        with torch.no_grad(), self._like_device():
            mean = self._predict(images)
            latents = mean + torch.empty_like(mean)
            (latents - mean).square().flatten(1).mean(1)

    def _predict(self, rows: int) -> Tensor:
        """Call the network on synthetic inputs, with guidance if there are two branches."""
        branches = self._inputs.branches
        shape = self._inputs.latent_shape
        latents = torch.empty(rows, *shape, device="meta").repeat(branches, *[1] * len(shape))
        shapes, dtypes = self._inputs.conditioning_shapes, self._inputs.conditioning_dtypes
        rows_of = synthetic_conditioning(shapes, dtypes, rows, "meta", self._dtype)
        conditioning = {name: torch.cat([value] * branches) for name, value in rows_of.items()}
        timesteps = torch.empty(branches * rows, device="meta")
        with IntegerIndices():
            output = self._inputs.call(self._network, latents.to(self._dtype), timesteps, **conditioning).float()
        if branches == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)

    def _recomputed(self, module: Any, *args: Any) -> Any:
        # Function modes are not active in the backward pass, so re-computation must enter its own.
        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._like_device()

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _checkpointing(network: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Enable gradient checkpointing through `function` for the duration of the body."""
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise ValueError(
            f"policy.gradient_checkpointing is true, and {type(network).__name__} cannot re-compute its activations: "
            "it has no enable_gradient_checkpointing, as diffusers' ModelMixin has; set it to false"
        )
    network.enable_gradient_checkpointing(function)
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


@dataclass(frozen=True, kw_only=True)
class NetworkCounts:
    """Parameters and bytes of a network, and its memory as a sampler has it."""

    parameters: int  # without adapters
    trained: int
    learner: PeakBytes  # by the transitions of a micro-batch, with weights and optimizer state
    network_bytes: int  # the sampler's weights, with the copy that merged adapters keep
    sampler: NetworkMemory
    work: NetworkWork | None  # None: no operation can be counted
    units: UnitBytes  # of the learner's network


def count_network(
    config: Any, network: Any, inputs: Inputs, device: DeviceKind, of_diffusers: bool = False
) -> NetworkCounts:
    """Make a network on the meta device trainable and count it.

    Args:
        config: the family's keys.
        network: on the meta device, as constructed.
        inputs: what the network is called with.
        device: the device whose memory is counted.
        of_diffusers: the network runs as in `DiffusersPolicy`, with weights of `store_in_dtype` in samplers.
    """
    parameters = count_parameters(network)
    make_trainable(network, config.train, config.lora)
    trained = sum(parameter.numel() for parameter in trained_parameters(network).values())
    work = network_work(network, inputs)  # first, because the next lines make the network compute as on a device
    memory = NetworkMemory(network, inputs, config.dtype_of("learner"), device)
    # Gradient and AdamW's two optimizer states, in float32, per trained parameter.
    held = parameter_bytes(network) + 3 * 4 * trained + library_bytes(device)
    memory.use_format(config.is_compiled("learner"))
    if of_diffusers:
        skip_unit_divisions(network)
    recomputes = config.gradient_checkpointing is True
    learner, units = memory.learning(recomputes).plus(held), unit_bytes(network)
    if config.train == "full" and config.dtype != "float32" and recomputes:
        units = replace(units, cached=config.dtype_of("learner").itemsize * trained)
    dtype = config.dtype_of("sampler")
    if config.train == "lora":
        memory.change_dtype(dtype)
    if of_diffusers and not config.merge_adapters:
        store_in_dtype(network, config.train, dtype)
    memory.use_format(config.is_compiled("sampler"))
    if of_diffusers and config.sampler_storage is not None:
        memory.store_layers_in(getattr(torch, config.sampler_storage))
    # Merging adapters keeps a copy of the base weights.
    network_bytes = parameter_bytes(network) + (base_weight_bytes(network) if config.merge_adapters else 0)
    return NetworkCounts(
        parameters=parameters,
        trained=trained,
        learner=learner,
        network_bytes=network_bytes,
        sampler=memory,
        work=work,
        units=units,
    )
