"""Off-policy corrections as pure functions, with one value per transition.

There are three policies: behavior, which sampled the trajectory; proximal, at the start of the round's update; and the
current one, θ.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.learner.algorithms.clip_bounds import ClipBounds
from ray_ddpo.learner.algorithms.losses import clipped_surrogate, gaussian_kl


def importance_weight(
    proximal_log_prob: Float[Tensor, "B"], old_log_prob: Float[Tensor, "B"], band: float
) -> Float[Tensor, "B"]:
    """Return w = π_prox / π_behavior, without gradient, with its logarithm clamped to ± `band`.

    The weight is on the scale of log_prob, the mean over latent elements. In nats its variance is too large to use.
    """
    return torch.exp((proximal_log_prob - old_log_prob).detach().clamp(-band, band))


def decoupled_surrogate(
    log_prob: Float[Tensor, "B"],
    proximal_log_prob: Float[Tensor, "B"],
    weight: Float[Tensor, "B"],
    advantages: Float[Tensor, "B"],
    clip_range: float | ClipBounds,
) -> Float[Tensor, "B"]:
    """Return −w · min(A r, A clamp(r, 1 ± clip_range)) with r = π_θ / π_prox.

    See Hilton et al. 2022, and AReaL, arXiv 2505.24298.
    """
    return weight.detach() * clipped_surrogate(log_prob, proximal_log_prob.detach(), advantages, clip_range)


def drift_nats(transition: Transition, behavior: Transition) -> Float[Tensor, "B"]:
    """Return the KL of one step between policies of equal σ: ‖μ − μ_behavior‖² / (2σ²), in nats, without gradient."""
    return gaussian_kl(Transition(transition.mean.detach(), transition.std), behavior)


def within_drift(drift: Float[Tensor, "B"], max_drift_nats: float) -> Float[Tensor, "B"]:
    """Return the mask of transitions: 1 if the step's KL is at most `max_drift_nats`, else 0.

    The KL comes from the means, never from a single log-ratio, which would select by the sampled noise.
    """
    return (drift <= max_drift_nats).float()


def unmasked_mean_factor(num_transitions: int, num_unmasked: int) -> float:
    """Return the factor that rescales a mean over all transitions of a step to a mean over unmasked ones."""
    return num_transitions / num_unmasked


def rescale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradients of all trained parameters, in place."""
    for parameter in parameters:
        assert parameter.grad is not None, "every trained parameter has its part in every step"
        parameter.grad.mul_(factor)
