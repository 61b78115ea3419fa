"""RoundBuffer: takes a round's scored rollouts and asks the algorithm what each picture is worth."""

import numpy as np
from jaxtyping import Bool, Float

from common.trajectory import Rollout, TrainBatch
from learner.advantages import PromptStatistics
from learner.algorithms.algorithm import Algorithm


class TooManySetAside(RuntimeError):
    """More pictures could not be scored than the run may lose, or none of a round is left."""


class RoundBuffer:
    """Owns the advantage statistics and which images are set aside, and nothing heavy.

    A group stands or falls together: where one of its images cannot be scored, the whole group is set aside.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        reward_weights: dict[str, float],
        images_per_prompt: int = 1,
        max_set_aside: int | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._weights = reward_weights
        self._group = images_per_prompt
        self._max_set_aside = max_set_aside
        self._reasons: list[str] = []  # of what this process saw set aside, the newest last
        self.statistics: PromptStatistics = {}  # in the checkpoint
        self.set_aside: dict[int, list[int]] = {}  # in the checkpoint: round → images, numbered in task order

    def train_batch(self, rollouts: list[Rollout]) -> tuple[TrainBatch, dict[str, float]]:
        """The round's advantages in task order, and the metrics of its rewards.

        What a round set aside before, it sets aside again, so that a round learned from twice arrives at the same bits.
        TooManySetAside: the run has lost more images than it may, or nothing of the round is left.
        """
        tasks = [rollout.report.task for rollout in rollouts]
        assert [task.index for task in tasks] == list(range(len(tasks))), "a round is learned from in task order"
        assert len({task.round for task in tasks}) == 1, "a round's tasks are of one round"
        prompts = [prompt.text for task in tasks for prompt in task.prompts]
        parts = {name: np.concatenate([rollout.scores.rewards[name] for rollout in rollouts]) for name in self._weights}
        kept = self._set_aside(tasks[0].round, rollouts, len(prompts))
        rewards = sum((weight * parts[name] for name, weight in self._weights.items()), np.zeros(len(prompts)))
        assert np.isfinite(rewards[kept]).all(), "a picture without a finite reward is set aside with its reason"
        texts = [prompt for prompt, is_kept in zip(prompts, kept, strict=True) if is_kept]
        self.statistics, worth = self._algorithm.advantages.advantages(self.statistics, texts, rewards[kept])
        advantages = np.full(len(prompts), np.nan)
        advantages[kept] = worth
        set_aside = tuple(np.flatnonzero(~kept).tolist())
        batch = TrainBatch(tasks[0].round, tuple(rollout.report for rollout in rollouts), advantages, set_aside)
        counts = {"images": float(len(prompts)), "images_set_aside": float(len(set_aside))}
        parts = {name: values[kept] for name, values in parts.items()}
        return batch, counts | _reward_metrics(texts, rewards[kept], parts, worth)

    def _set_aside(self, round: int, rollouts: list[Rollout], count: int) -> Bool[np.ndarray, "N"]:
        """Which of the round's images are learned from. TooManySetAside: too few."""
        images, first = list(self.set_aside.get(round, [])), 0
        for rollout in rollouts:
            images += [first + row for row in rollout.scores.set_aside]
            self._reasons += rollout.scores.set_aside.values()
            first += len(rollout.report.task.seeds)
        groups = {image // self._group for image in images}
        kept = np.array([image // self._group not in groups for image in range(count)])
        if groups:
            self.set_aside[round] = np.flatnonzero(~kept).tolist()
        total = sum(len(of_round) for of_round in self.set_aside.values())
        reasons = "; ".join(list(dict.fromkeys(reversed(self._reasons)))[:3]) or "said when they were set aside"
        if self._max_set_aside is not None and total > self._max_set_aside:
            raise TooManySetAside(
                f"{total} images of this run are set aside, whole groups of {self._group} counted, and at most "
                f"{self._max_set_aside} may be; the reasons: {reasons}"
            )
        if not kept.any():
            raise TooManySetAside(
                f"all {count} images of round {round} are set aside: nothing is left to learn from; the reasons: {reasons}"
            )
        return kept


def _reward_metrics(
    prompts: list[str], rewards: Float[np.ndarray, "N"], parts: dict[str, np.ndarray], advantages: np.ndarray
) -> dict[str, float]:
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "advantage/std": float(advantages.std()),
    }
    metrics |= {f"reward/{name}/mean": float(values.mean()) for name, values in parts.items()}
    for prompt in sorted(set(prompts)):
        of_prompt = rewards[[text == prompt for text in prompts]]
        metrics[f"reward/prompt/{prompt}"] = float(of_prompt.mean())
    return metrics
