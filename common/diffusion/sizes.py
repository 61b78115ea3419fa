"""How large a model is, without loading it: parameters and activations counted on torch's meta device."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicySizes:
    """What `ddpo plan` multiplies. Bytes are of the dtype the recipe gives."""

    latent_shape: tuple[int, int, int]
    conditioning_bytes: int  # of one prompt's embeddings
    network_parameters: int  # of the network that is trained, without adapters
    trained_parameters: int
    sampler_parameters: int  # of what only samplers load: text encoder and decoder
    activation_bytes: int  # kept for the backward pass of one transition, both branches of guidance


def count_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps for its backward pass: its inputs and its output, never the matrix of weights."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> None:
        raise NotImplementedError("only what the forward pass keeps is counted")


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)


def saved_activation_bytes(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps of a forward pass for its backward pass, without the parameters themselves."""
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: dict[int, int] = {}
    held: list[Tensor] = []  # a storage that was freed could lend its number to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    # The meta device has no fused attention of its own, which is what runs on every real device.
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(*inputs, return_dict=False)
    return sum(saved.values())
