"""How a role stores its network: the memory format, the dtype, and the dtype of a sampler's trained weights."""

import torch
from torch import nn

from ray_ddpo.common.diffusion.lora.adapters import trained_parameters

# Layers whose weights autocast rounds in every forward pass. Norms and embeddings compute with float32 weights.
AUTOCAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def network_format(device: str, is_compiled: bool, has_frames: bool = False) -> torch.memory_format:
    """Return channels_last for a compiled network of images on a GPU, and otherwise contiguous.

    Eager kernels for norms convert every channels_last activation: on an H100 the network ran at 0.91 and 0.98 × of
    contiguous. On a CPU channels_last was slower too. A compiled network was not measured on a GPU in either format.
    """
    return (
        torch.channels_last if is_compiled and not has_frames and device.startswith("cuda") else torch.contiguous_format
    )


def convert_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network to `dtype`, but for what diffusers keeps in float32 when it loads the class in another dtype.

    A class that keeps weights keeps its buffers too, such as the angles of positions.
    """
    kept = getattr(network, "_keep_in_fp32_modules", None)
    if not kept:
        network.to(dtype)
        return
    for name, parameter in network.named_parameters():
        stays = any(module in name.split(".") for module in kept)
        parameter.data = parameter.data.to(torch.float32 if stays else dtype)


def store_in_dtype(network: nn.Module, train: str, dtype: torch.dtype) -> None:
    """Convert trained weights that a forward pass would cast to `dtype` anyway. The outputs keep their bits.

    Loading float32 weights afterwards rounds them in the same way. A learner must not call this, since its optimizer
    needs float32 weights.

    Args:
        network: with its trained parameters, which autocast or the adapters' forward passes cast to `dtype`.
        train: "lora": convert all adapters; "full": convert linear layers and convolutions only.
        dtype: what the role computes in.
    """
    if train == "lora":
        converted = list(trained_parameters(network).values())
    else:
        layers = (module for module in network.modules() if type(module) in AUTOCAST_LAYERS)
        converted = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    for parameter in converted:
        parameter.data = parameter.data.to(dtype)
