"""Reference implementation of Flow-GRPO's stochastic flow matching: plain numbers in float64, independent of ours."""

import math


def shifted(sigma: float, shift: float) -> float:
    """Esser et al. 2024, equation 23: noise levels of a model that was trained on larger images."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sd3_sigmas(num_steps: int, shift: float, train_steps: int = 1000) -> list[float]:
    """σ before each step and after the last: even between the trained ends, then shifted."""
    highest, lowest = shifted(1.0, shift), shifted(1 / train_steps, shift)
    even = [highest + (lowest - highest) * index / (num_steps - 1) for index in range(num_steps)]
    return [*(shifted(sigma, shift) for sigma in even), 0.0]


def flux_sigmas(num_steps: int, tokens: int) -> list[float]:
    """σ even from 1 to 1/T, then moved by e^μ, with μ linear in the tokens: 0.5 at 256, 1.15 at 4096."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    even = [1 - index / num_steps for index in range(num_steps)]
    return [*(math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)) for sigma in even), 0.0]


def diffusion(sigma: float, second_sigma: float, level: float) -> float:
    """s of Flow-GRPO: a √(σ / (1 − σ)), and at the very start with the path's second σ below the line."""
    return level * math.sqrt(sigma / (1 - (second_sigma if sigma == 1 else sigma)))


def step(latent: float, velocity: float, sigma: float, following: float, s: float) -> tuple[float, float]:
    """Mean and standard deviation (Flow-GRPO, equation 9), as a drift and a spread over −dt."""
    span = sigma - following
    drift = velocity + s**2 / (2 * sigma) * (latent + (1 - sigma) * velocity)
    return latent - span * drift, s * math.sqrt(span)
