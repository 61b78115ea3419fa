"""Make both sides live: as actors on a Ray cluster, or in this process."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from actors.ray_rollout_stream import Pools, RayRolloutStream
from actors.reward_worker import RewardWorker
from actors.rollout_stream import RolloutStream, SerialPool, SerialRolloutStream, StreamSettings
from actors.sampler import Sampler
from actors.scoring import ScoringPool
from actors.worker_pool import RestartBudget, WorkerPool
from common.config import Recipe
from common.recipe_tables import RoleTable
from common.reward_pools import RewardPool, all_pools, elastic_roles
from deploy.parts import Parts
from deploy.supervision import Supervision
from deploy.trial_prompts import trial_prompts
from learner.learner import Learner
from learner.learner_group import LearnerGroup, RayLearnerGroup, SerialLearnerGroup
from learner.rank_group import ranks_of


@dataclass(frozen=True)
class Workers:
    """The two sides as the driver sees them."""

    stream: RolloutStream
    learner: LearnerGroup
    pools: tuple[WorkerPool, ...] = ()

    def close(self) -> None:
        """End the actors."""
        self.learner.close()
        for pool in self.pools:
            pool.close()


def serial_workers(parts: Parts, supervision: Supervision) -> Workers:
    """Everything in this process, for debugging. ValueError: the learner has several ranks."""
    recipe = parts.recipe
    if recipe.learner.ranks > 1:
        raise ValueError(
            f"learner.ranks is {recipe.learner.ranks} and --serial has one process: leave --serial out, or give "
            "--learner.ranks 1"
        )
    tried_on = trial_prompts(parts)
    sampler = Sampler(parts.policy, recipe.sampling, recipe.runtime, tried_on)
    pools = tuple(
        SerialPool(
            RewardWorker(parts.rewards_of(pool), pool.table, recipe.runtime, tried=True), pool.table, pool.trains
        )
        for pool in all_pools(recipe)
    )
    learner = Learner(parts.policy, parts.algorithm, recipe)
    stream = SerialRolloutStream(sampler, pools, _settings(recipe, supervision))
    return Workers(stream, SerialLearnerGroup(learner))


def ray_workers(parts: Parts, supervision: Supervision) -> Workers:
    """Actors of all roles, on the cluster that RAY_ADDRESS names or on one started here.

    ValueError: the cluster cannot hold a role, or a role could not be made ready in time.
    """
    recipe = parts.recipe
    trial_prompts(parts)  # before anything is started
    connect(recipe)
    supervision.listen()
    _refuse_what_cannot_be_held("learner", recipe.learner, recipe.learner.ranks)  # before any of them is started
    for role, table in elastic_roles(recipe).items():
        _refuse_what_cannot_be_held(role, table)
    budget = RestartBudget(recipe.runtime.max_restarts)
    # The learner comes first: on a cluster that is too small for all, it must have its place.
    make_learner = _learner_maker(parts)
    learner_actors = make_learner()
    scoring = tuple(_reward_workers(parts, pool, budget) for pool in all_pools(recipe))
    pools = Pools(_samplers(parts, budget), scoring, budget)
    stream = RayRolloutStream(pools, _settings(recipe, supervision))
    on_death = functools.partial(budget.spend, "learner")
    learner = RayLearnerGroup(learner_actors, make_learner, stream.work_until, on_death)
    workers = Workers(stream, learner, pools.all)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(workers.close)
        stream.wait_until_loaded({name: table.min for name, table in elastic_roles(recipe).items()})
        learner.wait_until_loaded()
        unless_loaded.pop_all()
    supervision.on_scale = {pool.name: pool.scale for pool in pools.all}
    return workers


def _samplers(parts: Parts, budget: RestartBudget) -> WorkerPool:
    table, recipe = parts.recipe.samplers, parts.recipe
    make = _maker(
        Sampler, "sampler", table, recipe, (parts.policy, recipe.sampling, recipe.runtime, trial_prompts(parts))
    )
    return WorkerPool("samplers", "sampler", make, table.count, budget)


def _reward_workers(parts: Parts, pool: RewardPool, budget: RestartBudget) -> ScoringPool:
    recipe, rewards = parts.recipe, parts.rewards_of(pool)
    role = pool.name.replace("reward_workers", "reward-worker").replace(".", "-") if pool.trains else "scorer"
    make = _maker(RewardWorker, role, pool.table, recipe, (rewards, pool.table, recipe.runtime, True))
    independent = all(reward.independent_of_batch for reward in rewards.values())
    workers = WorkerPool(pool.name, "reward_worker" if pool.trains else "scorer", make, pool.table.count, budget)
    return ScoringPool(workers, pool.rewards, pool.table, independent, pool.trains)


def _settings(recipe: Recipe, supervision: Supervision) -> StreamSettings:
    return StreamSettings(
        recipe.runtime,
        recipe.max_policy_lag + 1,
        recipe.samplers.overdue_factor,
        supervision.check,
    )


def connect(recipe: Recipe) -> None:
    """Attach to the cluster of RAY_ADDRESS, or start one on this machine that is large enough for the recipe."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    learner = recipe.learner.num_cpus * recipe.learner.ranks
    asked = learner + sum(table.num_cpus * table.count for table in elastic_roles(recipe).values())
    ray.init(address="local", num_cpus=int(max(os.cpu_count() or 1, -(-asked // 1))), log_to_driver=False)


def place_options(table: RoleTable) -> dict[str, Any]:
    """What an actor of a role asks of the cluster, as Ray's options."""
    options: dict[str, Any] = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus, "resources": table.resources}
    if table.accelerator_type:
        options["accelerator_type"] = table.accelerator_type
    return options


def _maker(cls: type, role: str, table: RoleTable, recipe: Recipe, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """What starts an actor of this role, named by run, role and number, and what is its own behind all others' arguments.

    The driver owns it: it ends with the driver.
    Every actor states its resources, so that an autoscaler sees what is lacking.
    """
    options = place_options(table)
    # A thread of its own answers what is asked of a busy actor; its work stays one call after the other, in order.
    options["concurrency_groups"] = {"health": 1}
    remote = ray.remote(**options)(cls)
    return lambda number, *own: remote.options(name=f"{recipe.name}/{role}-{number}").remote(*arguments, *own)


def _learner_maker(parts: Parts) -> Callable[[], list[Any]]:
    """What starts all ranks of the learner, rank 0 first; those started later have other numbers."""
    recipe, numbers = parts.recipe, itertools.count()
    make = _maker(Learner, "learner", recipe.learner, recipe, (parts.policy, parts.algorithm, recipe))
    return lambda: [make(next(numbers), ranks) for ranks in ranks_of(recipe)]


def _refuse_what_cannot_be_held(role: str, table: RoleTable, count: int = 1) -> None:
    """On a cluster that we attach to, nodes may still come: there the deadline of `runtime.ready_seconds` tells."""
    asked = {"CPU": table.num_cpus, "GPU": table.num_gpus, **table.resources}
    asked = {name: amount * count for name, amount in asked.items()}
    available = ray.cluster_resources()
    lacking = {name: amount for name, amount in asked.items() if amount > available.get(name, 0)}
    if lacking and "RAY_ADDRESS" not in os.environ:
        who = "one asks" if count == 1 else f"its {count} ranks ask"
        raise ValueError(f"{role}: {who} for {lacking}, and the whole cluster has {available}")
