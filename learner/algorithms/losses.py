"""Losses as pure functions, with one value per transition, which the learner averages."""

import functools
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.learner.algorithms.clip_bounds import ClipBounds


def clipped_surrogate(
    log_prob: Float[Tensor, "B"],
    old_log_prob: Float[Tensor, "B"],
    advantages: Float[Tensor, "B"],
    clip_range: float | ClipBounds,
) -> Float[Tensor, "B"]:
    """Return PPO's loss (Schulman et al. 2017, eq. 7) on one denoising step: max(−A r, −A clamp(r, 1 ± clip_range)).

    Args:
        clip_range: the range on both sides, or bounds of their own. With a dual clip c, the loss of a negative
            advantage is at most −c A (Ye et al. 2020, eq. 5).
    """
    bounds = clip_range if isinstance(clip_range, ClipBounds) else ClipBounds(clip_range, clip_range)
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1 - bounds.lower, 1 + bounds.upper)
    loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    return (
        loss
        if bounds.dual is None
        else torch.where(bounds.dual_clips(ratio, advantages), -bounds.dual * advantages, loss)
    )


def score_function(log_prob: Float[Tensor, "B"], advantages: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return −A log π, whose gradient on on-policy data is that of the expected reward (DDPO-SF, DDPO section 4.3)."""
    return -advantages * log_prob


def gaussian_kl(transition: Transition, reference: Transition) -> Float[Tensor, "B"]:
    """Return the KL of a step between policies of equal σ: ‖μ − μ_ref‖² / (2σ²), in nats, with gradient (DPOK)."""
    return transition.kl_nats(reference)


def sum_of(terms: Mapping[str, Float[Tensor, "B"]]) -> Float[Tensor, "B"]:
    """Return the sum of a loss's parts."""
    return functools.reduce(torch.add, terms.values())


def squared_error(predicted: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"]) -> Float[Tensor, "B"]:
    """Return the denoising loss of each image (Ho et al. 2020, eq. 14), mean over latent elements."""
    return (predicted - target).square().flatten(1).mean(1)


def negative_aware_terms(
    predicted: Float[Tensor, "B C *S"],
    old: Float[Tensor, "B C *S"],
    target: Float[Tensor, "B C *S"],
    optimality: Float[Tensor, "B"],
    beta: float,
) -> dict[str, Float[Tensor, "B"]]:
    """Return DiffusionNFT's objective: r ‖v⁺ − v‖² / β and (1 − r) ‖v⁻ − v‖² / β.

    Here v⁺ = (1−β) v_old + β v_θ and v⁻ = (1+β) v_old − β v_θ. Each squared error is divided by its mean absolute
    error, without gradient (the paper's adaptive weighting), so that no timestep dominates.
    """
    positive, negative = (1 - beta) * old + beta * predicted, (1 + beta) * old - beta * predicted
    return {
        "positive": optimality * _self_normalised(positive, target) / beta,
        "negative": (1 - optimality) * _self_normalised(negative, target) / beta,
    }


def _self_normalised(predicted: Tensor, target: Tensor) -> Float[Tensor, "B"]:
    scale = (predicted - target).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return squared_error(predicted, target) / scale
