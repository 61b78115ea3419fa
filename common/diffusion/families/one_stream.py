"""Networks over one stream of image and text tokens, as Z-Image and Lumina 2 have: their patches, places and layers."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad


def patches(latents: Float[Tensor, "B C H W"], patch: int) -> Float[Tensor, "B L D"]:
    """Return each square of latents as a token, in rows from the top, with the channels of a latent side by side."""
    squares = latents.unflatten(-1, (-1, patch)).unflatten(2, (-1, patch))
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatched(tokens: Float[Tensor, "B L D"], latents: Float[Tensor, "B C H W"], patch: int) -> Tensor:
    """Undo `patches`. The result has the shape of `latents`."""
    height, width = (side // patch for side in latents.shape[-2:])
    squares = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def places(
    frames: Int[Tensor, "L"], image_frames: Int[Tensor, "B 1"], height: int, width: int
) -> tuple[Int[Tensor, "B L 3"], Int[Tensor, "B L2 3"]]:
    """Return (frame, row, column) of text tokens at `frames`, and of the tokens of an image at one frame a prompt."""
    rows, device = len(image_frames), frames.device
    text = pad(frames.unsqueeze(1), (0, 2)).expand(rows, -1, -1)
    at_row, at_column = (torch.arange(side, device=device) for side in (height, width))
    grid = torch.stack(torch.meshgrid(at_row, at_column, indexing="ij"), dim=-1).flatten(0, 1).expand(rows, -1, -1)
    return text, torch.cat([image_frames.unsqueeze(1).expand(-1, height * width, -1), grid], dim=-1)


def through(network: Any, layers: Iterable[nn.Module], tokens: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return the output of layers, which are computed again in the backward pass if the network checkpoints."""
    for layer in layers:
        if network.gradient_checkpointing and torch.is_grad_enabled():
            tokens = network._gradient_checkpointing_func(layer, tokens, *inputs)
        else:
            tokens = layer(tokens, *inputs)
    return tokens
