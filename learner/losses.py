"""Policy-gradient losses of one denoising step, as pure functions; one value a pair, for the learner to average."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_surrogate(
    log_prob: Float[Tensor, "B"], old_log_prob: Float[Tensor, "B"], advantages: Float[Tensor, "B"], clip_range: float
) -> Float[Tensor, "B"]:
    """PPO (Schulman et al. 2017, eq. 7) on one denoising step: max(−A r, −A clamp(r, 1 ± clip_range))."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)
