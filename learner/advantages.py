"""What a reward is worth beside others: advantages, as pure functions with explicit state."""

import numpy as np
from jaxtyping import Float

PromptStatistics = dict[str, tuple[float, ...]]  # the last rewards of each prompt, oldest first

ROUND_EPSILON = 1e-8  # ddpo-pytorch and TRL, without tracking
PROMPT_EPSILON = 1e-6  # the same, with per-prompt tracking


def round_advantages(rewards: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """(reward − mean) / (std + 1e-8) over the round; population deviation."""
    rewards = rewards.astype(np.float64)
    return (rewards - rewards.mean()) / (rewards.std() + ROUND_EPSILON)


def extend_statistics(
    statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], buffer_size: int
) -> PromptStatistics:
    """The statistics with a round's rewards added in task order, keeping the last `buffer_size` of each prompt."""
    extended = dict(statistics)
    for prompt, reward in zip(prompts, rewards, strict=True):
        extended[prompt] = (*extended.get(prompt, ()), float(reward))[-buffer_size:]
    return extended


def per_prompt_advantages(
    statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], min_count: int
) -> Float[np.ndarray, "N"]:
    """(reward − mean) / (std + 1e-6) over the prompt's last rewards, this round's among them (DDPO, section 4.3).

    A prompt with fewer than `min_count` rewards is held against the whole round instead.
    """
    rewards = rewards.astype(np.float64)
    round_mean, round_std = rewards.mean(), rewards.std()
    advantages = np.empty_like(rewards)
    for place, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True)):
        history = np.array(statistics[prompt])
        enough = len(history) >= min_count
        mean, std = (history.mean(), history.std()) if enough else (round_mean, round_std)
        advantages[place] = (reward - mean) / (std + PROMPT_EPSILON)
    return advantages
