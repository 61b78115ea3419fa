"""RoundBuffer: takes a round's scored rollouts and asks the algorithm what each picture is worth."""

import numpy as np

from common.trajectory import Rollout, TrainBatch
from learner.advantages import PromptStatistics
from learner.algorithms.algorithm import Algorithm


class RoundBuffer:
    """Owns the advantage statistics, and nothing heavy."""

    def __init__(self, algorithm: Algorithm, reward_weights: dict[str, float]) -> None:
        self._algorithm = algorithm
        self._weights = reward_weights
        self.statistics: PromptStatistics = {}  # in the checkpoint

    def train_batch(self, rollouts: list[Rollout]) -> tuple[TrainBatch, dict[str, float]]:
        """The round's advantages in task order, and the metrics of its rewards."""
        tasks = [rollout.report.task for rollout in rollouts]
        assert [task.index for task in tasks] == list(range(len(tasks))), "a round is learned from in task order"
        assert len({task.round for task in tasks}) == 1, "a round's tasks are of one round"
        prompts = [prompt.text for task in tasks for prompt in task.prompts]
        parts = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]) for name in self._weights}
        rewards = sum((weight * parts[name] for name, weight in self._weights.items()), np.zeros(len(prompts)))
        self.statistics, advantages = self._algorithm.advantages.advantages(self.statistics, prompts, rewards)
        batch = TrainBatch(tasks[0].round, tuple(rollout.report for rollout in rollouts), advantages)
        return batch, _reward_metrics(prompts, rewards, parts, advantages)


def _reward_metrics(
    prompts: list[str], rewards: np.ndarray, parts: dict[str, np.ndarray], advantages: np.ndarray
) -> dict[str, float]:
    metrics = {
        "images": float(len(prompts)),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "advantage/std": float(advantages.std()),
    }
    metrics |= {f"reward/{name}/mean": float(values.mean()) for name, values in parts.items()}
    for prompt in sorted(set(prompts)):
        of_prompt = rewards[[text == prompt for text in prompts]]
        metrics[f"reward/prompt/{prompt}"] = float(of_prompt.mean())
    return metrics
