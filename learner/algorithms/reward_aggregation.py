"""RewardAggregation: several rewards become one number an image, compared as whole rounds and groups allow."""

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
Statistics = dict[str, PromptStatistics]  # by what is compared: JOINED, or each reward on its own
JOINED = "joined"


@dataclass(frozen=True)
class AggregatedAdvantages:
    """What images are worth, and each reward as it was joined, before its weight, where that is not the reward itself."""

    advantages: Float[np.ndarray, "N"]
    parts: Rewards


@dataclass(frozen=True)
class RewardAggregation:
    """How a recipe joins its rewards: `join` of `[aggregation]`, and weight and floor of each."""

    weights: dict[str, float]
    join: str = "sum"
    floors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> "RewardAggregation":
        """What the recipe's reward tables say."""
        floors = {table.called: table.floor for table in recipe.all_rewards if table.floor is not None}
        return cls({table.called: table.weight for table in recipe.all_rewards}, recipe.aggregation.kind, floors)

    @property
    def compared(self) -> tuple[str, ...]:
        """The rewards that are joined as something else than what they are."""
        return () if self.join == "sum" else tuple(self.weights)

    def check(self, algorithm: Algorithm) -> None:
        """ValueError: advantages of each reward are to be joined, and the algorithm has no advantages."""
        if self.join == "advantages" and algorithm.advantage_settings is None:
            raise ValueError(
                f"aggregation.kind is 'advantages', and {type(algorithm).__name__} makes weights of rewards and no advantages: "
                "join with 'sum', 'z_score' or 'win_rate', or take an algorithm with [algorithm.advantages]"
            )

    def compute_advantages(
        self, algorithm: Algorithm, statistics: Statistics, prompts: list[str], rewards: Rewards, images_per_prompt: int
    ) -> tuple[Statistics, AggregatedAdvantages]:
        """The statistics with these images in them, and what each image is worth."""
        if self.join == "advantages":
            return self._decoupled(algorithm, statistics, prompts, rewards, images_per_prompt)
        parts = {name: self._part(values, images_per_prompt) for name, values in rewards.items()}
        joined = self._with_floors(self._weighted(parts), rewards)
        of_joined, worth = algorithm.compute_advantages(statistics.get(JOINED, {}), prompts, joined, images_per_prompt)
        return {JOINED: of_joined}, AggregatedAdvantages(worth, {name: parts[name] for name in self.compared})

    def _decoupled(
        self, algorithm: Algorithm, statistics: Statistics, prompts: list[str], rewards: Rewards, images_per_prompt: int
    ) -> tuple[Statistics, AggregatedAdvantages]:
        """Advantages of each reward, by its own statistics; their sum, normalised over the round (GDPO, arXiv 2601.05242)."""
        assert algorithm.advantage_settings is not None, "such an algorithm is refused when the recipe is checked"
        extended, parts = {}, {}
        for name, values in rewards.items():
            of_reward = statistics.get(name, {})
            extended[name], parts[name] = algorithm.advantage_settings.advantages(
                of_reward, prompts, values, images_per_prompt
            )
        joined = round_advantages(self._with_floors(self._weighted(parts), rewards))
        return extended, AggregatedAdvantages(algorithm.from_advantages(joined), parts)

    def _part(self, values: Float[np.ndarray, "N"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
        if self.join == "z_score":
            return round_advantages(values)
        return win_rates(values, images_per_prompt) if self.join == "win_rate" else values.astype(np.float64)

    def _weighted(self, parts: Rewards) -> Float[np.ndarray, "N"]:
        return np.sum([weight * parts[name] for name, weight in self.weights.items()], axis=0)

    def _with_floors(self, joined: Float[np.ndarray, "N"], rewards: Rewards) -> Float[np.ndarray, "N"]:
        if not self.floors:
            return joined
        missing = np.sum([shortfall(rewards[name], floor) for name, floor in self.floors.items()], axis=0)
        return feasible_first(joined, missing)
