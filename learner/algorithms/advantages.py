"""Advantages and weights from rewards, as pure functions with explicit state."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.metrics.statistics import rows_by_name

PromptStatistics = dict[str, tuple[float, ...]]  # the last rewards of each prompt, oldest first

ROUND_EPSILON = 1e-8  # ddpo-pytorch and TRL, without tracking
PROMPT_EPSILON = 1e-6  # the same, with per-prompt tracking
GROUP_EPSILON = 1e-4  # Flow-GRPO

AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]  # DiffusionNFT's


def mean_and_std(values: Float[np.ndarray, "... N"]) -> tuple[Float[np.ndarray, "... 1"], Float[np.ndarray, "... 1"]]:
    """Return mean and population standard deviation over the last axis.

    If all values are equal, the mean is exactly that value. Otherwise rounding would give equal rewards advantages
    other than 0, which the division by an epsilon would make large.
    """
    alike = (values == values[..., :1]).all(axis=-1, keepdims=True)
    mean = np.where(alike, values[..., :1], values.mean(axis=-1, keepdims=True))
    return mean, np.where(alike, 0.0, values.std(axis=-1, keepdims=True))


def round_advantages(rewards: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Return (reward − mean) / (std + 1e-8) over the round, with the population standard deviation."""
    rewards = rewards.astype(np.float64)
    mean, std = mean_and_std(rewards)
    return (rewards - mean) / (std + ROUND_EPSILON)


def extend_statistics(
    statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], buffer_size: int
) -> PromptStatistics:
    """Return the statistics with a round's rewards added in task order, with the last `buffer_size` of each prompt."""
    added: dict[str, list[float]] = {}
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        added.setdefault(prompt, []).append(reward)
    return statistics | {name: (*statistics.get(name, ()), *new)[-buffer_size:] for name, new in added.items()}


def per_prompt_advantages(
    statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], min_count: int
) -> Float[np.ndarray, "N"]:
    """Return (reward − mean) / (std + 1e-6) over the prompt's last rewards, including this round's (DDPO, section 4.3).

    If a prompt has fewer than `min_count` rewards, mean and std are those of the round.
    """
    rewards = rewards.astype(np.float64)
    mean, std = mean_and_std(rewards)
    advantages = (rewards - mean) / (std + PROMPT_EPSILON)
    for prompt, rows in rows_by_name(prompts).items():
        if len(statistics[prompt]) >= min_count:
            mean, std = mean_and_std(np.array(statistics[prompt]))
            advantages[rows] = (rewards[rows] - mean) / (std + PROMPT_EPSILON)
    return advantages


def group_advantages(rewards: Float[np.ndarray, "N"], images_per_prompt: int, deviation: str) -> Float[np.ndarray, "N"]:
    """Return (reward − mean of its group) / (std + 1e-4) (GRPO; Flow-GRPO).

    Args:
        images_per_prompt: images of a group. A group's images are neighbors.
        deviation: "group" or "round", whose standard deviation divides; "none": nothing divides.
    """
    rewards = rewards.astype(np.float64)
    groups = rewards.reshape(-1, images_per_prompt)
    mean, std = mean_and_std(groups)
    if deviation == "none":
        return (groups - mean).ravel()
    return ((groups - mean) / ((std if deviation == "group" else rewards.std()) + GROUP_EPSILON)).ravel()


def win_rates(rewards: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
    """Return the fraction of its group's other images that an image beats (Pref-GRPO, arXiv 2508.20751).

    A tie counts half. A win rate depends on the order of rewards only, so an outlier counts no more than any other best
    image.
    """
    groups = rewards.reshape(-1, images_per_prompt).astype(np.float64)
    beats = np.sign(groups[:, :, None] - groups[:, None, :]).sum(axis=2)  # the number below minus the number above
    return (0.5 + 0.5 * beats / (images_per_prompt - 1)).ravel()


def shortfall(rewards: Float[np.ndarray, "N"], floor: float) -> Float[np.ndarray, "N"]:
    """Return each image's distance below a reward's floor, in standard deviations of the round; 0 if at or above it."""
    rewards = rewards.astype(np.float64)
    return np.maximum(0.0, floor - rewards) / (rewards.std() + ROUND_EPSILON)


def feasible_first(aggregated: Float[np.ndarray, "N"], shortfalls: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Rank images below a floor under all images that keep it, by their shortfall (Deb 2000, constraint handling).

    An image below a floor gets the worst score of those that keep it, minus its shortfall in standard deviations of
    `aggregated`. If no image keeps it, the scores are the negated shortfalls.
    """
    keeps = shortfalls == 0
    if not keeps.any():
        return -shortfalls
    scale = aggregated.std() or 1.0
    return np.where(keeps, aggregated, aggregated[keeps].min() - scale * shortfalls)


def softmax_weights(
    rewards: Float[np.ndarray, "N"], groups: list[str], inverse_temperature: float
) -> Float[np.ndarray, "N"]:
    """Return weights ∝ exp(inverse_temperature · reward), with mean 1 over the images of the same name in `groups`."""
    rewards = rewards.astype(np.float64)
    weights = np.empty_like(rewards)
    for chosen in rows_by_name(groups).values():
        powers = np.exp(inverse_temperature * (rewards[chosen] - rewards[chosen].max()))
        weights[chosen] = powers / powers.mean()
    return weights


def sparse_weights(
    statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], percentile: float, min_count: int
) -> Float[np.ndarray, "N"]:
    """Return 1 if a reward is at or above the percentile of its prompt's last rewards, including this round's; else 0.

    If a prompt has fewer than `min_count` rewards, the percentile is that of the round.
    """
    of_round = np.percentile(rewards, percentile)
    bars = np.empty(len(prompts))
    for prompt, rows in rows_by_name(prompts).items():
        enough = len(statistics[prompt]) >= min_count
        bars[rows] = np.percentile(statistics[prompt], percentile) if enough else of_round
    return (rewards.astype(np.float64) >= bars).astype(np.float64)


def optimality(advantages: Float[np.ndarray, "N"], clip: float, mode: AdvantageMode = "all") -> Float[np.ndarray, "N"]:
    """Return r = 1/2 + 1/2 clip(A / `clip`, −1, 1): 0 for the worst image, 1 for the best (DiffusionNFT).

    Args:
        mode: the authors' `adv_mode`. Advantages are first clamped to 0 … `clip` ("positive_only") or −`clip` … 0
            ("negative_only"), or replaced by 1 if above 0 and else 0 ("one_only"), or by their sign ("binary").
    """
    chosen = advantages.clip(-clip, clip)
    if mode == "positive_only":
        chosen = chosen.clip(0, None)
    elif mode == "negative_only":
        chosen = chosen.clip(None, 0)
    elif mode == "one_only":
        chosen = (chosen > 0).astype(chosen.dtype)
    elif mode == "binary":
        chosen = np.sign(chosen)
    return 0.5 + 0.5 * (chosen / clip).clip(-1, 1)
