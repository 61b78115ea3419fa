"""Reference implementations of further algorithms, by their papers: plain loops in float64, independent of ours."""

import math

import numpy as np


def group_advantages(rewards: list[float], size: int, by_round: bool) -> list[float]:
    """GRPO: each image against its group's mean, in deviations of the group or of the round."""
    advantages = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        mean = math.fsum(group) / size
        for reward in group:
            advantages.append((reward - mean) / (deviation(rewards if by_round else group) + 1e-4))
    return advantages


def deviation(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def softmax_weights(rewards: list[float], inverse_temperature: float) -> list[float]:
    """RWR: exp(β r) / Z, Z so that the mean is 1."""
    powers = [math.exp(inverse_temperature * reward) for reward in rewards]
    return [len(rewards) * power / math.fsum(powers) for power in powers]


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def negative_aware(
    predicted: np.ndarray, old: np.ndarray, target: np.ndarray, r: float, beta: float, scales: tuple[float, float]
) -> float:
    """DiffusionNFT: 5 (r ‖v⁺ − v‖² / s⁺ + (1 − r) ‖v⁻ − v‖² / s⁻) / β, with s the branches' mean absolute errors."""
    total = 0.0
    for x, o, t in zip(predicted.ravel(), old.ravel(), target.ravel(), strict=True):
        positive, negative = (1 - beta) * o + beta * x, (1 + beta) * o - beta * x
        total += r * (positive - t) ** 2 / scales[0] + (1 - r) * (negative - t) ** 2 / scales[1]
    return 5 * total / beta / predicted.size


def negative_aware_scales(
    predicted: np.ndarray, old: np.ndarray, target: np.ndarray, beta: float
) -> tuple[float, float]:
    branches = ((1 - beta) * old + beta * predicted, (1 + beta) * old - beta * predicted)
    return tuple(float(np.abs(branch - target).mean()) for branch in branches)
