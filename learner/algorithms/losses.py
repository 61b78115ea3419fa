"""Losses as pure functions; one value a pair, for the learner to average."""

import functools
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.transition import Transition


def clipped_surrogate(
    log_prob: Float[Tensor, "B"], old_log_prob: Float[Tensor, "B"], advantages: Float[Tensor, "B"], clip_range: float
) -> Float[Tensor, "B"]:
    """PPO (Schulman et al. 2017, eq. 7) on one denoising step: max(−A r, −A clamp(r, 1 ± clip_range))."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def score_function(log_prob: Float[Tensor, "B"], advantages: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """−A log π: its gradient is that of the expected reward, on the policy's own data (DDPO-SF, DDPO section 4.3)."""
    return -advantages * log_prob


def gaussian_kl(transition: Transition, reference: Transition) -> Float[Tensor, "B"]:
    """KL in nats of one step between two policies with the same σ: ‖μ − μ_ref‖² / (2σ²), with gradient (as in DPOK)."""
    moved = (transition.mean - reference.mean) / transition.std.view(-1, 1, 1, 1)
    return 0.5 * moved.square().flatten(1).sum(1)


def sum_of(terms: Mapping[str, Float[Tensor, "B"]]) -> Float[Tensor, "B"]:
    """Return the loss that has these parts."""
    return functools.reduce(torch.add, terms.values())


def squared_error(predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, "B"]:
    """The denoising loss of each image (Ho et al. 2020, eq. 14), mean over latent elements."""
    return (predicted - target).square().flatten(1).mean(1)


def negative_aware_terms(
    predicted: Float[Tensor, "B C H W"],
    old: Float[Tensor, "B C H W"],
    target: Float[Tensor, "B C H W"],
    optimality: Float[Tensor, "B"],
    beta: float,
) -> dict[str, Float[Tensor, "B"]]:
    """r ‖v⁺ − v‖² / β and (1 − r) ‖v⁻ − v‖² / β, v⁺ = (1−β) v_old + β v_θ, v⁻ = (1+β) v_old − β v_θ (DiffusionNFT's objective).

    Each square is divided by its own mean absolute error, without gradient (the paper's adaptive weighting), so that no timestep
    drowns the others.
    """
    positive, negative = (1 - beta) * old + beta * predicted, (1 + beta) * old - beta * predicted
    return {
        "positive": optimality * _self_normalised(positive, target) / beta,
        "negative": (1 - optimality) * _self_normalised(negative, target) / beta,
    }


def _self_normalised(predicted: Tensor, target: Tensor) -> Float[Tensor, "B"]:
    scale = (predicted - target).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return squared_error(predicted, target) / scale
