"""From a recipe to its components: each one that it names, built and checked before anything heavy starts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.packages import require_packages
from ray_ddpo.common.prompts import PROMPTS, PromptSource
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component, build
from ray_ddpo.common.recipe.reward_pools import RewardPool, reward_pools
from ray_ddpo.common.recipe.tables import ComponentTable, RewardTable
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.tracker import Tracker
from ray_ddpo.common.user_code.blame import call_if_own
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.optimization.optimizer import check_optimizer

SAMPLING = ("policy", "prompts")  # tables that each kind of command uses
SCORING = (*SAMPLING, "reward")
TRAINING = (*SCORING, "algorithm", "learner", "trackers")


@dataclass(frozen=True, kw_only=True)
class Given:
    """Components that a Python program hands over as objects. Each takes the place of the one that the recipe names."""

    policy: PolicyConfig | None = None
    prompts: PromptSource | None = None
    algorithm: Algorithm | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)  # by the name that the recipe's metrics call them
    trackers: Mapping[str, Tracker] = field(default_factory=dict)  # by name; those that the recipe does not name too


NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class Components:
    """The components of a recipe. They are light, and travel to the process that makes them live."""

    recipe: Recipe
    policy: PolicyConfig
    prompts: PromptSource
    rewards: dict[str, Reward]
    scorers: dict[str, Reward]  # looked at, never trained on
    aggregation: RewardAggregation
    algorithm: Algorithm
    trackers: dict[str, Tracker]

    def rewards_of(self, pool: RewardPool) -> dict[str, Reward]:
        """Return the rewards that a pool of reward workers holds."""
        return {name: (self.rewards | self.scorers)[name] for name in pool.rewards}

    def by_place(self) -> dict[str, Component]:
        """Return every component by its place in the recipe."""
        rewards = {f"reward.{name}": reward for name, reward in (self.rewards | self.scorers).items()}
        trackers = {f"trackers.{name}": tracker for name, tracker in self.trackers.items()}
        return {
            "policy": self.policy,
            "prompts": self.prompts,
            "algorithm": self.algorithm,
            **rewards,
            **trackers,
        }

    def resolved(self) -> dict[str, Any]:
        """Return the recipe's tables with every default filled in, those of the components too."""
        tables = self.recipe.model_dump()
        tables["policy"] |= self.policy.model_dump()
        tables["prompts"] |= self.prompts.model_dump()
        tables["algorithm"] |= self.algorithm.model_dump()
        named = "rewards" if self.recipe.rewards else "reward"
        rewards = [
            {**table.model_dump(), **self.rewards[table.called].model_dump()} for table in self.recipe.all_rewards
        ]
        tables[named] = rewards if named == "rewards" else rewards[0]
        tables["trackers"] = [
            {**table.model_dump(), **self.trackers[table.name].model_dump()} for table in self.recipe.trackers
        ]
        return tables


def build_components(recipe: Recipe, given: Given = NOTHING_GIVEN, used: Collection[str] = TRAINING) -> Components:
    """Build every component that the recipe names, and check that what they need is there.

    Args:
        recipe: the recipe.
        given: components that a Python program handed over.
        used: tables of the recipe that the command uses. Packages that only the others need may be missing.

    Raises:
        ValueError: a name or key is not known, or what a component needs is not there.
    """
    components = components_of(recipe, given)
    check_packages(components, used)
    call_if_own(components.policy, POLICIES, "check")
    components.policy.lora_files()
    call_if_own(components.prompts, PROMPTS, "load")
    if "trackers" in used:
        for tracker in components.trackers.values():
            call_if_own(tracker, TRACKERS, "check")
    return components


def check_packages(components: Components, used: Collection[str] = TRAINING) -> None:
    """Check that the packages of the tables in `used` are installed.

    Raises:
        ValueError: a package is missing; the message names the command that installs it.
    """
    for place, component in components.by_place().items():
        if place.partition(".")[0] in used:
            require_packages(f"the recipe's {place}", *component.required_packages)
    if "learner" in used:
        check_optimizer(components.recipe.learner)


def components_of(recipe: Recipe, given: Given = NOTHING_GIVEN) -> Components:
    """Build every component that the recipe names, without a look at the files and packages that they need.

    Raises:
        ValueError: a name or key is not known, or the algorithm does not go with the rest.
    """
    algorithm: Algorithm = given.algorithm or build(ALGORITHMS, recipe.algorithm.table(), "algorithm", Algorithm)
    policy: PolicyConfig = given.policy or build(POLICIES, recipe.policy.table(), "policy", PolicyConfig)
    algorithm.check_columns(recipe)
    algorithm.check(recipe, policy)
    aggregation = RewardAggregation.of(recipe)
    aggregation.check(algorithm)
    policy.check_sampling(recipe.sampling)
    algorithm.check_micro_batches(recipe, policy.stochastic_steps(recipe.sampling))
    trackers = {name: build(TRACKERS, {"name": name}, "trackers") for name in ("jsonl", "terminal", "ray")}
    for table in recipe.trackers:
        trackers[table.name] = given.trackers.get(table.name) or build(TRACKERS, table.table(), "trackers", Tracker)
    rewards = {table.called: given.rewards.get(table.called) or build_reward(table) for table in recipe.all_rewards}
    scorers = {table.called: build_reward(table) for table in recipe.evaluation.scorers}
    _check_caches(recipe, rewards)
    return Components(
        recipe,
        policy,
        given.prompts or build(PROMPTS, recipe.prompts.table(), "prompts", PromptSource),
        rewards,
        scorers,
        aggregation,
        algorithm,
        {**trackers, **given.trackers},
    )


def _check_caches(recipe: Recipe, rewards: dict[str, Reward]) -> None:
    for pool in reward_pools(recipe):
        if pool.table.cache and not any(rewards[name].independent_of_batch for name in pool.rewards):
            raise ValueError(
                f"{pool.name}.cache is {pool.table.cache}, and the scores of {list(pool.rewards)} depend on the batch that a "
                "image stands in, so that a remembered one may differ in bits: set it to 0"
            )


def build_reward(table: RewardTable) -> Reward:
    """Build the reward that a `[reward]` table names."""
    return build(REWARDS, ComponentTable.table(table), "reward", Reward)
