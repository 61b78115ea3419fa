"""From a recipe to its components: each one that it names, built and checked before anything heavy starts."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.frames import FrameScoring
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.metrics.group_statistics import RewardRange, weighted_range
from ray_ddpo.common.packages import require_packages
from ray_ddpo.common.prompts import PROMPTS, PromptSource
from ray_ddpo.common.recipe.bounds import default_values
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component, build
from ray_ddpo.common.recipe.reward_pools import RewardPool, reward_pools
from ray_ddpo.common.recipe.tables import ComponentTable, RewardTable
from ray_ddpo.common.runtime import undisturbed
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.tracker import Tracker
from ray_ddpo.common.user_code.blame import call_if_own
from ray_ddpo.deploy.driver.clip_checks import check_clips, check_video_package
from ray_ddpo.deploy.driver.given_image_checks import check_given_images
from ray_ddpo.deploy.driver.input_image_checks import check_input_images
from ray_ddpo.deploy.driver.reward_gradients import check_reward_gradients
from ray_ddpo.deploy.driver.sampling_checks import (
    check_held_out_steps,
    check_kl_reward,
    check_replay,
    check_saved_calls,
    check_unguided,
)
from ray_ddpo.deploy.driver.suite_checks import check_suite
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.optimization.optimizer import check_optimizer
from ray_ddpo.learner.sharding_check import check_sharding

LOADING = ("policy",)  # tables that each kind of command uses
SAMPLING = (*LOADING, "prompts")
SCORING = (*SAMPLING, "reward")
TRAINING = (*SCORING, "algorithm", "learner", "trackers")
TRIED = 2  # prompts that a synthetic batch repeats
_TRIAL = 12  # hashed with the run's seed, so that these prompts are independent of the rounds' prompts


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

    @property
    def image_source(self) -> PromptSource | None:
        """Return the prompt source if it gives images that samplers encode; None if they sample images."""
        return self.prompts if self.prompts.gives_images else None

    def rewards_of(self, pool: RewardPool) -> dict[str, Reward]:
        """Return the rewards that a pool of reward workers holds."""
        return {name: (self.rewards | self.scorers)[name] for name in pool.rewards}

    @property
    def frame_scoring(self) -> dict[str, FrameScoring]:
        """Return how each reward and scorer scores the frames of a clip, by name."""
        tables = (*self.recipe.all_rewards, *self.recipe.scorers)
        return {table.called: FrameScoring.of(table) for table in tables}

    @property
    def reward_range(self) -> RewardRange | None:
        """The range of the weighted sum of the rewards; None if one of them has no bound."""
        ranges = {name: reward.score_range for name, reward in self.rewards.items()}
        return weighted_range(ranges, self.aggregation.weights)

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
        return self._tables(lambda model: model.model_dump())

    def defaults(self) -> dict[str, Any]:
        """Return the default of every key that has one, in the tables of `resolved`."""
        return self._tables(default_values)

    def _tables(self, values: Callable[[BaseModel], dict[str, Any]]) -> dict[str, Any]:
        """Return the recipe's tables with those of its components, each as `values` gives it."""
        tables = values(self.recipe)
        for name in ("policy", "prompts", "algorithm"):
            tables[name] = {**tables.get(name, {}), **values(getattr(self, name))}
        named = "rewards" if self.recipe.rewards else "reward"
        rewards = [{**values(table), **values(self.rewards[table.called])} for table in self.recipe.all_rewards]
        tables[named] = rewards if named == "rewards" else rewards[0]
        tables["trackers"] = [{**values(table), **values(self.trackers[table.name])} for table in self.recipe.trackers]
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
    components = components_of(recipe, given, trains="learner" in used)
    check_packages(components, used)
    if "reward" in used:
        check_clips(recipe, components.policy, components.rewards | components.scorers)
        if recipe.evaluation.followed:  # so that prompts that were not fetched are named early
            build_eval_set(recipe.evaluation, components.prompts)
    call_if_own(components.policy, POLICIES, "check")
    components.policy.lora_files()
    check_held_out_steps(recipe, components.policy)
    # Files of images are read where a run starts: a plan needs none.
    if "prompts" in used and not components.prompts.gives_images and not components.prompts.input_columns:
        call_if_own(components.prompts, PROMPTS, "load")
    if components.algorithm.restarts_per_image is not None and "learner" in used:
        components = replace(components, algorithm=with_reward_gradients(components))
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
    check_video_package(components.policy)
    if "learner" in used:
        check_optimizer(components.recipe.learner)


def components_of(recipe: Recipe, given: Given = NOTHING_GIVEN, trains: bool = True) -> Components:
    """Build every component that the recipe names, without a look at the files and packages that they need.

    Args:
        recipe: the recipe.
        given: components that a Python program handed over.
        trains: check what the learner alone needs of the recipe.

    Raises:
        ValueError: a name or key is not known, or the algorithm does not go with the rest.
    """
    algorithm: Algorithm = given.algorithm or build(ALGORITHMS, recipe.algorithm.table(), "algorithm", Algorithm)
    policy: PolicyConfig = given.policy or build(POLICIES, recipe.policy.table(), "policy", PolicyConfig)
    algorithm.check_columns(recipe)
    if trains:
        algorithm.check(recipe, policy)
    check_sharding(recipe, policy)
    aggregation = RewardAggregation.of(recipe)
    aggregation.check(algorithm)
    policy.check_sampling(recipe.sampling)
    check_saved_calls(recipe, policy, algorithm)
    check_kl_reward(recipe, policy)
    check_unguided(policy, algorithm)
    if trains:
        check_replay(recipe, algorithm)
    algorithm.check_micro_batches(recipe, policy.stochastic_steps(recipe.sampling))
    trackers = {name: build(TRACKERS, {"name": name}, "trackers") for name in ("jsonl", "terminal", "ray")}
    for table in recipe.trackers:
        trackers[table.name] = given.trackers.get(table.name) or build(TRACKERS, table.table(), "trackers", Tracker)
    rewards = {table.called: given.rewards.get(table.called) or build_reward(table) for table in recipe.all_rewards}
    scorers = {table.called: build_reward(table) for table in recipe.scorers}
    check_suite(recipe, policy, rewards, {table.called: build_reward(table) for table in recipe.suite_scorers})
    _check_caches(recipe, rewards)
    if trains:  # the gradient passes through the rewards that are trained on, not through those of an evaluation
        check_reward_gradients(recipe, policy, algorithm, rewards)
    prompts: PromptSource = given.prompts or build(PROMPTS, recipe.prompts.table(), "prompts", PromptSource)
    check_given_images(recipe, policy, prompts, algorithm, rewards)
    check_input_images(recipe, policy, prompts)
    return Components(
        recipe,
        policy,
        prompts,
        rewards,
        scorers,
        aggregation,
        algorithm,
        {**trackers, **given.trackers},
    )


def with_reward_gradients(components: Components) -> Algorithm:
    """Hand the rewards that are trained on to the algorithm, which evaluates them with gradients."""
    recipe, sample = components.recipe, call_if_own(components.prompts, PROMPTS, "load")
    with undisturbed():
        prompts = [sample(np.random.default_rng([recipe.seed, _TRIAL, number])) for number in range(TRIED)]
    return components.algorithm.with_rewards(recipe, components.rewards, prompts)


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
