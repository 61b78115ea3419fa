"""Learning from a policy that has moved on: what is made of the distance, as pure functions; one value a pair.

Three policies: behavior, which sampled the trajectory; proximal, at the start of the round's update; the present one, θ.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.learner.algorithms.losses import clipped_surrogate, gaussian_kl


def importance_weight(
    proximal_log_prob: Float[Tensor, "B"], old_log_prob: Float[Tensor, "B"], band: float
) -> Float[Tensor, "B"]:
    """w = π_prox / π_behaviour, without gradient and with its logarithm held within ± `band`.

    On the scale of log_prob, the mean over latent elements: in nats the weight is far too wild to use.
    """
    return torch.exp((proximal_log_prob - old_log_prob).detach().clamp(-band, band))


def decoupled_surrogate(
    log_prob: Float[Tensor, "B"],
    proximal_log_prob: Float[Tensor, "B"],
    weight: Float[Tensor, "B"],
    advantages: Float[Tensor, "B"],
    clip_range: float,
) -> Float[Tensor, "B"]:
    """−w · min(A r, A clamp(r, 1 ± clip_range)), r = π_θ / π_prox (Hilton et al. 2022; AReaL, arXiv 2505.24298)."""
    return weight.detach() * clipped_surrogate(log_prob, proximal_log_prob.detach(), advantages, clip_range)


def drift_nats(transition: Transition, behavior: Transition) -> Float[Tensor, "B"]:
    """KL of one step between two policies with the same σ: ‖μ − μ_behaviour‖² / (2σ²), without gradient."""
    return gaussian_kl(Transition(transition.mean.detach(), transition.std), behavior)


def within_drift(drift: Float[Tensor, "B"], max_drift_nats: float) -> Float[Tensor, "B"]:
    """1 where a pair is learned from, 0 where its step has moved too far.

    From the means and never from the single log-ratio: that would select on the noise that was sampled.
    """
    return (drift <= max_drift_nats).float()


def unmasked_mean_factor(num_transitions: int, num_unmasked: int) -> float:
    """What turns a mean over all pairs of an optimizer step, where masked ones count 0, into that over those left."""
    return num_transitions / num_unmasked


def rescale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradients of all trained parameters, in place."""
    for parameter in parameters:
        assert parameter.grad is not None, "every trained parameter has its part in every step"
        parameter.grad.mul_(factor)
