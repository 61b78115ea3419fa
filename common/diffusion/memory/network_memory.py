"""The peak memory of a policy's work: a learner's step, a sampler's forward pass, a decoding, on the meta device."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes, line_through, peak_bytes
from ray_ddpo.common.diffusion.memory.meta_device import LikeDevice, kernels_of
from ray_ddpo.common.diffusion.memory.sizes import DeviceKind
from ray_ddpo.common.diffusion.memory.synthetic_inputs import IntegerIndices, made_up_conditioning

BATCHES = (1, 2)  # a peak is a line in the batch, and two points tell it


@dataclass(frozen=True)
class Inputs:
    """What the network is called with, a row each."""

    call: Callable[..., Tensor]  # (network, latents, timesteps, **rows of conditioning) → output
    latent_shape: tuple[int, int, int]
    conditioning_shapes: dict[str, tuple[int, ...]]
    branches: int  # rows an image
    conditioning_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of what is not floating, as labels are


class NetworkMemory:
    """A network on the meta device, with what is trained in it, as it works."""

    def __init__(self, network: Any, inputs: Inputs, dtype: torch.dtype, device: DeviceKind) -> None:
        from peft.tuners.lora import LoraLayer

        self._network = network.to(memory_format=torch.channels_last) if device == "cuda" else network
        self._inputs = inputs
        self._dtype = dtype
        self._device: DeviceKind = device
        adapted = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
        self._has_adapters = bool(adapted)  # else autocast is around the network
        for layer in adapted:
            self._autocast_alone(layer)

    def _autocast_alone(self, layer: Any) -> None:
        """As `compute_adapters_in` has it on a real device."""
        forward, layer.cast_input_dtype_enabled = layer.forward, False

        def in_half(*args: Any, **keys: Any) -> Tensor:
            with LikeDevice(self._device, self._dtype):
                return forward(*args, **keys)

        layer.forward = in_half

    def _like_device(self) -> LikeDevice:
        return LikeDevice(self._device, torch.float32 if self._has_adapters else self._dtype)

    def change_dtype(self, dtype: torch.dtype) -> None:
        """What is not trained, in `dtype`, as samplers may have it."""
        self._dtype = dtype
        for parameter in self._network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def learning(self, checkpointing: bool) -> PeakBytes:
        """What a step takes beside weights, gradients and the optimizer's moments, by pairs."""
        for parameter in self._network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with _checkpointing(self._network, self._recomputed) if checkpointing else contextlib.nullcontext():
            return self._line(self._learn)

    def sampling(self) -> PeakBytes:
        """What a denoising step without gradient takes beside the weights, by images."""
        return self._line(self._draw)

    def decoding(self, vae: Any) -> PeakBytes:
        """What the decoder takes from latents to images beside its weights, by images."""
        if self._device == "cuda":
            vae.to(memory_format=torch.channels_last)

        def decode(images: int) -> None:
            with torch.no_grad(), LikeDevice(self._device, torch.float32):  # it runs in its own dtype
                scaled = torch.empty(images, *self._inputs.latent_shape, device="meta", dtype=vae.dtype) / 1.0
                pixels = vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5
                (pixels.clamp(0, 1) * 255).round().to(torch.uint8)

        return self._line(decode)

    def _line(self, work: Callable[[int], None]) -> PeakBytes:
        return line_through(lambda rows: peak_bytes(lambda: work(rows), kernels_of(self._device)), *BATCHES)

    def _learn(self, pairs: int) -> None:
        with self._like_device():
            predicted = self._predict(pairs)
            torch.autograd.backward((predicted - torch.empty_like(predicted)).square().mean())

    def _draw(self, images: int) -> None:
        with torch.no_grad(), self._like_device():
            mean = self._predict(images)
            latents = mean + torch.empty_like(mean)
            (latents - mean).square().flatten(1).mean(1)

    def _predict(self, rows: int) -> Tensor:
        branches = self._inputs.branches
        latents = torch.empty(rows, *self._inputs.latent_shape, device="meta").repeat(branches, 1, 1, 1)
        made_up = self._inputs.conditioning_shapes, self._inputs.conditioning_dtypes, rows, "meta", self._dtype
        conditioning = {name: torch.cat([value] * branches) for name, value in made_up_conditioning(*made_up).items()}
        timesteps = torch.empty(branches * rows, device="meta")
        with IntegerIndices():
            output = self._inputs.call(self._network, latents.to(self._dtype), timesteps, **conditioning).float()
        if branches == 1:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)

    def _recomputed(self, module: Any, *args: Any) -> Any:
        # The backward pass leaves function modes behind, so what it computes again enters one of its own.
        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._like_device()

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _checkpointing(network: Any, function: Callable[..., Any]) -> Iterator[None]:
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise ValueError(
            f"policy.gradient_checkpointing is true, and {type(network).__name__} cannot re-compute its activations: it has "
            "no enable_gradient_checkpointing, as diffusers' ModelMixin has; set it to false"
        )
    network.enable_gradient_checkpointing(function)
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()
