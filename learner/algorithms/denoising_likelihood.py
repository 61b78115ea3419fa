"""Log-probs of a finished image by its denoising error (Advantage Weighted Matching), as pure functions."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
EPSILON = 1e-10  # inside the roots, so that an error of 0 has a gradient


def matching_log_prob(
    errors: Float[Tensor, "B"], noise_levels: Float[Tensor, "B"], weighting: Weighting, power: float
) -> Float[Tensor, "B"]:
    """Return AWM's log-prob of each noised sample in float64: its negative denoising error, weighted (2509.25050).

    The formulas are those of the authors' code (`compute_log_prob_awm`). With the error e and the noise level t:
    −e, −t e, −t² e, −t (√(e + ε) − 1e-5), or −t ((e + ε)^p − ε^p) / p.

    Args:
        errors: mean squared errors of the prediction.
        noise_levels: t, the time of flow matching, 0 … 1.
        power: p, of `ghuber` only.
    """
    error, t = errors.double(), noise_levels.double()
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -t * error
    if weighting == "t2":
        return -t.square() * error
    if weighting == "huber":
        return -t * (torch.sqrt(error + EPSILON) - EPSILON**0.5)
    return -t * ((error + EPSILON).pow(power) - EPSILON**power) / power
