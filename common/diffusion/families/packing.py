"""Pack squares of 2 × 2 latents into the tokens of a transformer, and unpack them."""

from jaxtyping import Float
from torch import Tensor

PATCH = 2  # latents per side in one token of the transformer


def packed(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B L C4"]:
    """Pack each square of 2 × 2 latents into a token, in rows from the top."""
    rows, channels, height, width = latents.shape
    squares = latents.view(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def unpacked(tokens: Float[Tensor, "B L C4"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Undo `packed`."""
    rows, _, channels = tokens.shape
    squares = tokens.view(rows, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // PATCH**2, height, width)
