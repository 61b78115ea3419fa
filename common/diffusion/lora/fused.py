"""Fused adapters: add a linear layer's adapter to the layer's output in one matrix product, in sampler and learner."""

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER = "default"  # PEFT's name for the trained adapter


def fuse_adapters(network: nn.Module) -> None:
    """Let each plain linear layer with an adapter compute it by `fused_forward`. Other layers keep PEFT's forward."""
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer) and _can_be_fused(layer):
            layer.forward = MethodType(fused_forward, layer)


def is_fused(layer: Any) -> bool:
    """Return whether the layer computes its adapter by `fused_forward`."""
    return getattr(layer.forward, "__func__", None) is fused_forward


# Without shapes in its annotations, because torch.compile traces it, and their checks with it.
def fused_forward(layer: Any, inputs: Tensor, *arguments: Any, **keys: Any) -> Tensor:
    """Compute x Wᵀ + b + α/r · (x Aᵀ) Bᵀ (Hu et al. 2021, eq. 3). The last product adds in place to the output.

    PEFT multiplies by α/r and adds in two more passes over the output, and rounds half precision at each. The adapter
    computes in the dtype of the layer's output. Gradients reach its float32 weights through the cast. If adapters are
    disabled or merged, and while dropout may be active, PEFT's own forward runs.
    """
    if arguments or keys or layer.disable_adapters or layer.merged or _drops_out(layer):
        return type(layer).forward(layer, inputs, *arguments, **keys)
    rows = inputs.reshape(-1, inputs.shape[-1])  # in-place work on a view would cost copies in the backward pass
    output = layer.base_layer(rows)
    down = layer.lora_A[ADAPTER].weight.to(output.dtype)
    up = layer.lora_B[ADAPTER].weight.to(output.dtype)
    output.addmm_(F.linear(rows, down), up.t(), alpha=layer.scaling[ADAPTER])
    return output.view(*inputs.shape[:-1], output.shape[-1])


def _drops_out(layer: Any) -> bool:
    return layer.training and not isinstance(layer.lora_dropout[ADAPTER], nn.Identity)


def _can_be_fused(layer: Any) -> bool:
    """Return whether a layer is a plain linear one, with the trained adapter alone, and no DoRA, bias or quantization."""
    from peft.tuners.lora.layer import Linear

    plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.fan_in_fan_out
    return plain and list(layer.lora_A) == [ADAPTER] and not layer.lora_variant and not layer.lora_bias[ADAPTER]
