"""Make both sides live: as actors on a Ray cluster, or in this process."""

import os
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.reward_worker import RewardWorker
from actors.rollout_stream import RayRolloutStream, RolloutStream, SerialRolloutStream
from actors.sampler import Sampler
from common.config import Recipe, RoleTable
from deploy.composition import Parts
from learner.learner import Learner
from learner.learner_group import LearnerGroup, RayLearnerGroup, SerialLearnerGroup

READY_SECONDS = 600.0  # until the actors have a place on the cluster and have loaded their models


@dataclass(frozen=True)
class Workers:
    """The two sides as the driver sees them."""

    stream: RolloutStream
    learner: LearnerGroup
    actors: list[Any] = field(default_factory=list)

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        for actor in self.actors:
            ray.kill(actor)


def serial_workers(parts: Parts) -> Workers:
    """Everything in this process, for debugging."""
    recipe = parts.recipe
    sampler = Sampler(parts.policy, recipe.sampling, recipe.runtime)
    reward_worker = RewardWorker(parts.rewards, recipe.reward_workers.batch_size, recipe.runtime)
    learner = Learner(parts.policy, parts.algorithm, recipe)
    stream = SerialRolloutStream(sampler, reward_worker, recipe.max_policy_lag + 1)
    return Workers(stream, SerialLearnerGroup(learner))


def ray_workers(parts: Parts) -> Workers:
    """Actors of all roles, on the cluster that RAY_ADDRESS names or on one started here.

    ValueError: the cluster cannot hold a role, or a role could not be made ready in time.
    """
    recipe = parts.recipe
    connect(recipe)
    samplers = _start(Sampler, "sampler", recipe.samplers, recipe, (parts.policy, recipe.sampling, recipe.runtime))
    reward_arguments = (parts.rewards, recipe.reward_workers.batch_size, recipe.runtime)
    reward_workers = _start(RewardWorker, "reward-worker", recipe.reward_workers, recipe, reward_arguments)
    (learner,) = _start(Learner, "learner", recipe.learner, recipe, (parts.policy, parts.algorithm, recipe))
    actors = [*samplers, *reward_workers, learner]
    _await_ready(actors)
    stream = RayRolloutStream(samplers, reward_workers, recipe.max_policy_lag + 1)
    return Workers(stream, RayLearnerGroup(learner), actors)


def connect(recipe: Recipe) -> None:
    """Attach to the cluster of RAY_ADDRESS, or start one on this machine that is large enough for the recipe."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    roles = ((recipe.samplers, recipe.samplers.count), (recipe.reward_workers, recipe.reward_workers.count))
    asked = recipe.learner.num_cpus + sum(table.num_cpus * count for table, count in roles)
    ray.init(address="local", num_cpus=int(max(os.cpu_count() or 1, -(-asked // 1))), log_to_driver=False)


def _start(cls: type, role: str, table: RoleTable, recipe: Recipe, arguments: tuple[Any, ...]) -> list[Any]:
    """This role's actors, named by run and role. The driver owns them: they end with it."""
    asked = {"CPU": table.num_cpus, "GPU": table.num_gpus, **table.resources}
    available = ray.cluster_resources()
    lacking = {name: amount for name, amount in asked.items() if amount > available.get(name, 0)}
    if lacking:
        raise ValueError(f"a {role} asks for {lacking}, and the whole cluster has {available}")
    options = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus, "resources": table.resources}
    if table.accelerator_type:
        options["accelerator_type"] = table.accelerator_type
    make = ray.remote(cls)
    return [
        make.options(name=f"{recipe.name}/{role}-{index}", **options).remote(*arguments)
        for index in range(getattr(table, "count", 1))
    ]


def _await_ready(actors: list[Any]) -> None:
    """Wait until every actor has loaded its models; an actor's own error is raised as it is."""
    waiting = {actor.ready.remote(): actor for actor in actors}
    pending = list(waiting)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=READY_SECONDS)
        if not ready:
            names = [repr(waiting[reference]) for reference in pending]
            raise ValueError(f"after {READY_SECONDS:.0f} s these actors have no place or are not loaded: {names}")
        ray.get(ready)
