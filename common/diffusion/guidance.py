"""Classifier-free guidance (Ho & Salimans 2022): combine the unconditional and the conditional prediction."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Num
from torch import Tensor

BOTH = "negative_and_"  # prefix of rows of both branches, the unconditional one first
NEGATIVE = "negative_"  # prefix of rows of the unconditional branch
INPUT = "input_"  # prefix of rows of input images
Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # (latents, timesteps, rows of conditioning) → output
Combine = Callable[[Tensor, Tensor, float], Tensor]  # (unconditional, conditional, guidance scale) → guided output


def is_shared(name: str) -> bool:
    """Return whether all prompts share one row: those of the negative prompt, unless they depend on the input image."""
    return name.startswith(NEGATIVE) and not name.startswith(NEGATIVE + INPUT)


def extrapolated(
    unconditional: Float[Tensor, "B C *S"], conditional: Float[Tensor, "B C *S"], guidance_scale: float
) -> Float[Tensor, "B C *S"]:
    """Return u + w (c − u)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def guided(
    predict: Predict,
    latents: Float[Tensor, "B C *S"],
    timesteps: Num[Tensor, "B"],
    conditioning: dict[str, Tensor],
    guidance_scale: float | None,
    combine: Combine = extrapolated,
) -> Float[Tensor, "B C *S"]:
    """Predict both branches in one batch and combine them in float32.

    Without a `guidance_scale` only the prompt's branch is computed, and returned as the network gives it. A family whose
    pipeline combines the branches in another way gives its own `combine`.
    """
    if guidance_scale is None:
        return predict(latents, timesteps, _positive(conditioning))
    joined = {name.removeprefix(BOTH): rows for name, rows in join_branches(conditioning).items()}
    both = predict(latents.repeat(2, *[1] * (latents.ndim - 1)), timesteps.repeat(2), joined)
    unconditional, conditional = both.float().chunk(2)
    return combine(unconditional, conditional, guidance_scale)


def join_branches(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor's rows of both branches, named `negative_and_…`. Rows that are joined already are not joined again.

    Both branches see the same input images, named `input_…`, unless the family has negative rows of them.
    """
    joined = {name: value for name, value in conditioning.items() if name.startswith(BOTH)}
    if joined:
        return joined

    def negative(name: str, value: Tensor) -> Tensor:
        own = NEGATIVE + name
        return value if name.startswith(INPUT) and own not in conditioning else conditioning[own]

    rows = _positive(conditioning).items()
    return {f"{BOTH}{name}": torch.cat([negative(name, value), value]) for name, value in rows}


def _positive(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in conditioning.items() if not name.startswith(NEGATIVE)}
