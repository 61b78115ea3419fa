"""RewardAggregation: combine several rewards into one advantage an image."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.advantages import (
    PromptStatistics,
    feasible_first,
    round_advantages,
    shortfall,
    win_rates,
)
from ray_ddpo.learner.algorithms.algorithm import Algorithm

Rewards = dict[str, Float[np.ndarray, "N"]]
Statistics = dict[str, PromptStatistics]  # by the reward's name, or AGGREGATED for the aggregated reward
AGGREGATED = "joined"  # written into checkpoints


@dataclass(frozen=True)
class AggregatedAdvantages:
    """Advantages (or weights) of images, and the parts they were aggregated from.

    `parts` has each transformed reward before its weight. It is empty if the rewards are summed as they are.
    """

    advantages: Float[np.ndarray, "N"]
    parts: Rewards


@dataclass(frozen=True)
class RewardAggregation:
    """How to aggregate rewards: weighted sum, z-scored sum, sum of per-reward advantages (GDPO), or group win rates.

    `kind` is that of `[aggregation]`. Each reward has a weight and perhaps a floor.
    """

    weights: dict[str, float]
    kind: str = "sum"
    floors: dict[str, float] = field(default_factory=dict)
    kl_reward: float = 0.0  # coefficient of the trajectory's KL, which is subtracted from the aggregated reward

    @classmethod
    def of(cls, recipe: Recipe) -> "RewardAggregation":
        """Return the aggregation of a recipe's reward tables."""
        floors = {table.called: table.floor for table in recipe.all_rewards if table.floor is not None}
        weights = {table.called: table.weight for table in recipe.all_rewards}
        return cls(weights, recipe.aggregation.kind, floors, recipe.sampling.kl_reward)

    @property
    def compared(self) -> tuple[str, ...]:
        """The names of rewards that are transformed before they are summed."""
        return () if self.kind == "sum" else tuple(self.weights)

    def check(self, algorithm: Algorithm) -> None:
        """Check the aggregation against the algorithm.

        Raises:
            ValueError: per-reward advantages are to be summed, and the algorithm has no advantages, or a KL is to be
                subtracted from the reward.
        """
        if self.kind == "advantages" and self.kl_reward:
            raise ValueError(
                f"aggregation.kind is 'advantages' and sampling.kl_reward {self.kl_reward:g}: the KL is subtracted from "
                "one aggregated reward, and there is none; aggregate with 'sum', 'z_score' or 'win_rate', or leave "
                "kl_reward out and give algorithm.kl_coef"
            )
        if self.kind == "advantages" and "advantages" not in type(algorithm).model_fields:
            raise ValueError(
                f"aggregation.kind is 'advantages', and {type(algorithm).__name__} makes weights of rewards and no "
                "advantages: aggregate with 'sum', 'z_score' or 'win_rate', or take an algorithm with "
                "[algorithm.advantages]"
            )

    def compute_advantages(
        self,
        algorithm: Algorithm,
        statistics: Statistics,
        prompts: list[str],
        rewards: Rewards,
        images_per_prompt: int,
        path_kl: Float[np.ndarray, "N"] | None = None,
    ) -> tuple[Statistics, AggregatedAdvantages]:
        """Return the statistics with these images added, and the images' advantages.

        Args:
            path_kl: the KL of each image's trajectory in nats, if it is to be subtracted from the reward.
        """
        if self.kind == "advantages":
            return self._decoupled(algorithm, statistics, prompts, rewards, images_per_prompt)
        parts = {name: self._part(values, images_per_prompt) for name, values in rewards.items()}
        aggregated = self.aggregate(parts, rewards, path_kl)
        of_aggregated, advantages = algorithm.compute_advantages(
            statistics.get(AGGREGATED, {}), prompts, aggregated, images_per_prompt
        )
        parts = {name: parts[name] for name in self.compared}
        signal = algorithm.select(algorithm.from_advantages(advantages), images_per_prompt)
        return {AGGREGATED: of_aggregated}, AggregatedAdvantages(signal, parts)

    def aggregate(
        self, parts: Rewards, rewards: Rewards, path_kl: Float[np.ndarray, "N"] | None = None
    ) -> Float[np.ndarray, "N"]:
        """Return one aggregated reward an image, or its aggregated advantage if advantages are summed.

        Args:
            parts: each transformed reward before its weight, or each reward if they are summed as they are.
            rewards: the rewards as they were scored, of which floors are checked.
            path_kl: the KL of each image's trajectory in nats, if it is to be subtracted from the reward.
        """
        penalty = 0.0 if path_kl is None else self.kl_reward * path_kl
        aggregated = self._with_floors(self._weighted(parts) - penalty, rewards)
        return round_advantages(aggregated) if self.kind == "advantages" else aggregated

    def _decoupled(
        self, algorithm: Algorithm, statistics: Statistics, prompts: list[str], rewards: Rewards, images_per_prompt: int
    ) -> tuple[Statistics, AggregatedAdvantages]:
        """Sum the advantages of each reward, and normalize the sum over the round (GDPO, arXiv 2601.05242)."""
        extended, parts = {}, {}
        for name, values in rewards.items():
            of_reward = statistics.get(name, {})
            extended[name], parts[name] = algorithm.compute_advantages(of_reward, prompts, values, images_per_prompt)
        signal = algorithm.select(algorithm.from_advantages(self.aggregate(parts, rewards)), images_per_prompt)
        return extended, AggregatedAdvantages(signal, parts)

    def _part(self, values: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
        if self.kind == "z_score":
            return round_advantages(values)
        return win_rates(values, images_per_prompt) if self.kind == "win_rate" else values.astype(np.float64)

    def _weighted(self, parts: Rewards) -> Float[np.ndarray, "N"]:
        return np.sum([weight * parts[name] for name, weight in self.weights.items()], axis=0)

    def _with_floors(self, aggregated: Float[np.ndarray, "N"], rewards: Rewards) -> Float[np.ndarray, "N"]:
        if not self.floors:
            return aggregated
        missing = np.sum([shortfall(rewards[name], floor) for name, floor in self.floors.items()], axis=0)
        return feasible_first(aggregated, missing)
