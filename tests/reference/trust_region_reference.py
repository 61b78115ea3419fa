"""PPO's dual clip, GRPO-Guard and Flow-DPPO as their authors write them: one transition at a time, in float64."""

import math

import numpy as np


def clipped_surrogate(ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """Return the loss of Ye et al. 2020 (arXiv 1912.09729), equation 5, with bounds of their own on both sides."""
    gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return -max(gain, dual * advantage) if dual is not None and advantage < 0 else -gain


def mean_square(one: np.ndarray, other: np.ndarray) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)) / one.size


def guard_loss(
    log_ratio: float,
    means: tuple[np.ndarray, np.ndarray],
    noise_scale: tuple[float, float],
    advantage: float,
    clip: float,
) -> float:
    """Return GRPO-Guard's loss as in yifan123/flow_grpo's scripts/train_flux_GRPO_Guard.py.

    verl-omni has the same (verl_omni/trainer/diffusion/diffusion_algos.py, GRPOGuardLoss).

    Args:
        log_ratio: log_prob − old_log_prob, means over latent elements.
        means: of the step under the current and the old policy.
        noise_scale: sigma_t and √−dt. Their product is the standard deviation of the step.
    """
    sigma_t, sqrt_dt = noise_scale
    bias = mean_square(*means) / (2 * (sqrt_dt * sigma_t) ** 2)
    ratio = math.exp((log_ratio + bias) * (sqrt_dt * sigma_t))
    return clipped_surrogate(ratio, advantage, clip, clip) / sqrt_dt**2


def dppo_loss(
    log_ratio: float, means: tuple[np.ndarray, np.ndarray], std: float, advantage: float, threshold: float
) -> float:
    """Return Flow-DPPO's loss as in Tencent-Hunyuan/UniRL's unirl/algorithms/flowdppo.py, _flowdppo_kl_adv_loss."""
    ratio = math.exp(log_ratio)
    is_far = mean_square(*means) / (2 * std**2) >= threshold
    removed = is_far and ((ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0))
    return 0.0 if removed else -advantage * ratio
