"""Losses that compare the images of a group by their denoising errors, as pure functions: DPO and DGPO.

A loss of several rows is a function of each row's error. So its gradient is Σ slope · ∇error, and each row can be
passed in a micro-batch of its own once the slopes are known.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ComparedErrors:
    """The denoising errors of P sets of K images with the same noise and timestep, without gradient."""

    errors: Float[Tensor, "P K"]  # mean squared errors under the current weights
    reference: Float[Tensor, "P K"]  # under the reference weights
    old: Float[Tensor, "P K"]  # under the sampling policy
    signals: Float[Tensor, "P K"]  # the images' learning signals


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """A coupled loss, taken apart into rows. The mean over rows of `loss` is the mean over sets of the sets' loss."""

    loss: Float[Tensor, "P K"]  # its value
    slopes: Float[Tensor, "P K"]  # derivative of the sum of `loss` in each row's error
    agrees: Float[
        Tensor, "P K"
    ]  # 1 if the policy, relative to the reference, ranks the set as its rewards do; a tie: ½
    clipped: Float[Tensor, "P K"]  # 1 if the row's slope was set to 0


def pair_preference(compared: ComparedErrors, beta: float) -> Coupling:
    """Return the coupling of Diffusion-DPO: −log σ(−β/2 ((e_w − e_w,ref) − (e_l − e_l,ref))) (2311.12908, eq. 14).

    The error e is the mean over latent elements, and β includes the factor T, as in the authors' code. A pair's chosen
    image has signal 1, the rejected one −1.
    """
    margin = (compared.signals * (compared.errors - compared.reference)).sum(1, keepdim=True)
    inside = -0.5 * beta * margin
    of_pair = -F.logsigmoid(inside)
    # Each of the two rows has the pair's loss, so that the mean over rows is that over pairs.
    slopes = 2 * torch.sigmoid(-inside) * 0.5 * beta * compared.signals
    agrees = _share_above_0(inside)
    zeros = torch.zeros_like(compared.signals)
    return Coupling(loss=of_pair + zeros, slopes=slopes, agrees=agrees + zeros, clipped=zeros)


def group_preference(compared: ComparedErrors, beta: float, clip_range: float) -> Coupling:
    """Return the coupling of DGPO (2510.08425): σ(β/K Σ A (e − e_ref)) · A · e, with the weight σ without gradient.

    The loss is that of the authors' code, which leaves out the constant factor β of the derivative of −log σ.

    Args:
        clip_range: an image's slope is 0 if exp(e_old − e) is outside 1 ± this range, on the side that its advantage
            pulls to.
    """
    moved = compared.errors - compared.reference
    inside = (beta / moved.shape[1]) * (compared.signals * moved).sum(1, keepdim=True)
    slopes = torch.sigmoid(inside) * compared.signals
    ratio = torch.exp(compared.old - compared.errors)
    clipped = torch.where(compared.signals > 0, ratio > 1 + clip_range, ratio < 1 - clip_range).to(slopes.dtype)
    agrees = _share_above_0(-inside) + torch.zeros_like(slopes)
    return Coupling(loss=slopes * compared.errors, slopes=slopes * (1 - clipped), agrees=agrees, clipped=clipped)


def _share_above_0(values: Float[Tensor, "P 1"]) -> Float[Tensor, "P 1"]:
    return torch.where(values == 0, 0.5, (values > 0).to(values.dtype))
