"""Classifier-free guidance (Ho & Salimans 2022): combine the unconditional and the conditional prediction."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Num
from torch import Tensor

Predict = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # (latents, timesteps, rows of conditioning) → output


def guided(
    predict: Predict,
    latents: Float[Tensor, "B C H W"],
    timesteps: Num[Tensor, "B"],
    conditioning: dict[str, Tensor],
    guidance_scale: float | None,
) -> Float[Tensor, "B C H W"]:
    """Predict both branches in one batch and combine them in float32.

    Without a `guidance_scale` only the prompt's branch is computed, and returned as the network gives it.
    """
    rows = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
    if guidance_scale is None:
        return predict(latents, timesteps, rows)
    joined = {name: torch.cat([conditioning[f"negative_{name}"], value]) for name, value in rows.items()}
    both = predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), joined)
    unconditional, conditional = both.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
