"""Make both sides live: as actors on a Ray cluster, or in this process."""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray import cloudpickle

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rollouts.ray_stream import Pools, RayRolloutStream
from ray_ddpo.actors.rollouts.scoring_scheduler import ScoringPool
from ray_ddpo.actors.rollouts.stream import RolloutStream, SerialPool, SerialRolloutStream, StreamSettings
from ray_ddpo.actors.rollouts.worker_pool import LOADS_TRIED, RestartBudget, WorkerPool
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.base_parts import LoadedBase
from ray_ddpo.common.process_deaths import LOADING, Death, in_one_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import RewardPool, all_pools, elastic_roles
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.common.role_loading import RoleNotStarted, starting
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.deploy.driver.cluster import attach, attaches, start_here
from ray_ddpo.deploy.driver.cluster_watch import ClusterWatch
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.death_lines import DeathLines
from ray_ddpo.deploy.driver.reaper import start_reaper
from ray_ddpo.deploy.driver.role_actor import RoleSetting, role_actor
from ray_ddpo.deploy.driver.role_output import RoleOutput
from ray_ddpo.deploy.driver.supervision import Supervision, sheltered_from_hangup
from ray_ddpo.deploy.driver.trial_prompts import checked_prompts, trial_prompts
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.learner_group import LearnerGroup, SerialLearnerGroup
from ray_ddpo.learner.process_group import ranks_of
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup

SAMPLER_SECONDS = 10.0  # that a learner which cannot start waits for a sampler, which may say the same


@dataclass(frozen=True)
class Workers:
    """The two sides as the driver sees them."""

    stream: RolloutStream
    learner: LearnerGroup
    pools: tuple[WorkerPool, ...] = ()
    told: tuple[DeathLines | RoleOutput, ...] = ()
    supervision: Supervision | None = None

    def close(self) -> None:
        """End the actors, and wait for what is still to be said of them.

        If the cluster is lost, they end with their owner, this process.
        """
        if self.supervision is not None and self.supervision.cluster_is_lost:
            return
        self.learner.close()
        for pool in self.pools:
            pool.close()
        for each in self.told:
            each.close()


def serial_workers(parts: Components, supervision: Supervision, base: LoadedBase) -> Workers:
    """Everything in this process, for debugging. ValueError: the learner has several ranks, or `base` refuses what was loaded."""
    recipe = parts.recipe
    if recipe.learner.world_size > 1:
        raise ValueError(
            f"learner.world_size is {recipe.learner.world_size} and --serial has one process: leave --serial out, or give "
            "--learner.world_size 1"
        )
    tried_on = trial_prompts(parts)
    with starting("sampler"):
        sampler = Sampler(parts.policy, recipe.sampling, recipe.runtime, tried_on, checked_prompts(parts))
    pools = tuple(_serial_pool(parts, pool, base) for pool in all_pools(recipe))
    with starting("learner"):
        learner = Learner(parts.policy, parts.algorithm, recipe)
    base.take("learner", learner.loaded_parts())
    base.take("sampler", sampler.loaded_parts())
    stream = SerialRolloutStream(sampler, pools, _settings(recipe, supervision))
    return Workers(stream, SerialLearnerGroup(learner))


def _serial_pool(parts: Components, pool: RewardPool, base: LoadedBase) -> SerialPool:
    with starting(_in_words(pool)):
        worker = RewardWorker(parts.rewards_of(pool), pool.table, parts.recipe.runtime, tried=True)
    base.take(_in_words(pool), worker.loaded_parts())
    return SerialPool(worker, pool.table, pool.trains)


def _in_words(pool: RewardPool) -> str:
    return "reward worker" if pool.trains else "scorer"


def ray_workers(parts: Components, supervision: Supervision, base: LoadedBase) -> Workers:
    """Actors of all roles, on the cluster that RAY_ADDRESS names or on one started here.

    ValueError: the cluster cannot hold a role, a role could not be made ready in time, or `base` refuses what one has loaded.
    """
    recipe = parts.recipe
    trial_prompts(parts)  # before anything is started
    _refuse_what_cannot_travel(parts)
    output = RoleOutput(RunFolder(recipe.run_path()).logs)
    connect(recipe, output)
    supervision.listen()
    supervision.watch(ClusterWatch(supervision.lose_cluster, own_cluster=not attaches()))
    _refuse_what_cannot_be_held("learner", recipe.learner, recipe.learner.world_size)  # before any of them is started
    for role, table in elastic_roles(recipe).items():
        _refuse_what_cannot_be_held(role, table)
    _refuse_what_does_not_fit_together(recipe)
    budget, lines = RestartBudget(recipe.runtime.max_restarts), DeathLines(output)
    # The learner comes first: on a cluster that is too small for all, it must have its place.
    make_learner = _learner_maker(parts)
    learner_actors = make_learner()
    scoring = tuple(_reward_workers(parts, pool, budget, lines) for pool in all_pools(recipe))
    pools = Pools(_samplers(parts, budget, lines), scoring, budget)
    for pool in pools.all:
        pool.on_loaded = base.take
    stream = RayRolloutStream(pools, _settings(recipe, supervision))
    on_death = functools.partial(_learner_died, budget, lines)
    learner = RayLearnerGroup(learner_actors, make_learner, stream.work_until, on_death)
    learner.on_loaded = base.take
    workers = Workers(stream, learner, pools.all, (lines, output), supervision)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(workers.close)
        _wait_until_loaded(recipe, stream, learner)
        unless_loaded.pop_all()
    supervision.on_scale = {pool.name: pool.scale for pool in pools.all}
    return workers


def _wait_until_loaded(recipe: Recipe, stream: RayRolloutStream, learner: RayLearnerGroup) -> None:
    """Wait for all roles; meanwhile, whichever cannot start ends the wait. RoleNotStarted: as in one process."""
    try:
        learner.wait_until_loaded()
    except RoleNotStarted:
        # A model that no role can load is the samplers' error in one process, where theirs is loaded first.
        with contextlib.suppress(TimeoutError):
            stream.wait_for_one(stream.samplers, SAMPLER_SECONDS)
        raise
    stream.wait_until_loaded({name: table.min for name, table in elastic_roles(recipe).items()})


def _learner_died(budget: RestartBudget, lines: DeathLines, death: Death) -> None:
    who = "the learner" if death.number is None else f"learner-{death.number}"
    lines.tell(who, death, "the learner is started again from its last whole round")
    budget.spend("learner", in_one_line(death.reason), LOADS_TRIED if death.at == LOADING else None)


def _samplers(parts: Components, budget: RestartBudget, lines: DeathLines) -> WorkerPool:
    table, recipe = parts.recipe.samplers, parts.recipe
    arguments = (parts.policy, recipe.sampling, recipe.runtime, trial_prompts(parts))
    make_first, make_other = (
        _maker(Sampler, "sampler", table, recipe, given) for given in ((*arguments, checked_prompts(parts)), arguments)
    )

    def make(number: int) -> Any:
        return (make_other if number else make_first)(number)  # one of them says which prompts are cut

    return _told(lines, "sampler", WorkerPool("samplers", "sampler", make, table.count, budget))


def _reward_workers(parts: Components, pool: RewardPool, budget: RestartBudget, lines: DeathLines) -> ScoringPool:
    recipe, rewards = parts.recipe, parts.rewards_of(pool)
    name = pool.name.replace("reward_workers", "reward-worker").replace(".", "-") if pool.trains else "scorer"
    make = _maker(RewardWorker, name, pool.table, recipe, (rewards, pool.table, recipe.runtime, True), _in_words(pool))
    independent = all(reward.independent_of_batch for reward in rewards.values())
    workers = WorkerPool(pool.name, "reward_worker" if pool.trains else "scorer", make, pool.table.count, budget)
    return ScoringPool(_told(lines, name, workers), pool.rewards, pool.table, independent, pool.trains)


def _told(lines: DeathLines, name: str, pool: WorkerPool) -> WorkerPool:
    """The pool, whose deaths are told of on the terminal."""
    pool.on_death = lambda death: lines.tell(f"{name}-{death.number}", death, "another is started in its place")
    return pool


def _settings(recipe: Recipe, supervision: Supervision) -> StreamSettings:
    return StreamSettings(
        recipe.runtime,
        recipe.max_policy_lag + 1,
        recipe.samplers.straggler_factor,
        supervision.check,
    )


def connect(recipe: Recipe, output: RoleOutput) -> None:
    """Attach to the cluster of RAY_ADDRESS, or start one on this machine that is large enough for the recipe.

    What roles print comes to `output`, unless this process is attached to a cluster already.

    Raises:
        ValueError: RAY_ADDRESS or TMPDIR keeps this process from it.
    """
    # Or, where a run ends by the error of one call, Ray prints those of the others that were under way, with all their frames.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if ray.is_initialized():
        return
    output.attach()
    children = psutil.Process().children()
    with sheltered_from_hangup():
        _init(recipe)
    start_reaper([child for child in psutil.Process().children() if child not in children])


def _init(recipe: Recipe) -> None:
    if attaches():
        attach(log_to_driver=True)
        return
    learner = recipe.learner.num_cpus * recipe.learner.world_size
    asked = learner + sum(table.num_cpus * table.count for table in elastic_roles(recipe).values())
    start_here(int(max(os.cpu_count() or 1, -(-asked // 1))))


def place_options(table: RoleTable) -> dict[str, Any]:
    """What an actor of a role asks of the cluster, as Ray's options."""
    options: dict[str, Any] = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus, "resources": table.resources}
    if table.accelerator_type:
        options["accelerator_type"] = table.accelerator_type
    return options


def _maker(
    cls: type, name: str, table: RoleTable, recipe: Recipe, arguments: tuple[Any, ...], role: str | None = None
) -> Callable[[int], Any]:
    """What starts an actor of a role, named by run, `name` and number; `role` is how an error calls it.

    The driver owns it: it ends with the driver.
    Every actor states its resources, so that an autoscaler sees what is lacking.
    """
    options = place_options(table)
    # A thread of its own answers what is asked of a busy actor; its work stays one call after the other, in order.
    options["concurrency_groups"] = {"health": 1}
    remote, given = ray.remote(**options)(role_actor(cls)), ray.put(arguments)
    path, sees_gpus = f"{cls.__module__}:{cls.__qualname__}", table.num_gpus > 0

    def make(number: int) -> Any:
        setting = RoleSetting(f"{name}-{number}", role or name, path, sees_gpus)
        return remote.options(name=f"{recipe.name}/{name}-{number}").remote(setting, [given])

    return make


def _learner_maker(parts: Components) -> Callable[[], list[Any]]:
    """What starts all ranks of the learner, rank 0 first; those started later have other numbers."""
    recipe, numbers, makers = parts.recipe, itertools.count(), []
    for ranks in ranks_of(recipe):
        role = f"learner {ranks}" if ranks.count > 1 else "learner"
        arguments = (parts.policy, parts.algorithm, recipe, ranks)
        makers.append(_maker(Learner, "learner", recipe.learner, recipe, arguments, role))
    return lambda: [make(next(numbers)) for make in makers]


def _refuse_what_cannot_travel(parts: Components) -> None:
    """Raise ValueError if a component cannot be sent to another process, such as a function that holds an open file."""
    rewards = {f"the reward {name!r}": reward for name, reward in (parts.rewards | parts.scorers).items()}
    for what, component in {**rewards, "the algorithm": parts.algorithm, "the policy": parts.policy}.items():
        try:
            with blamed("pickling it"):
                cloudpickle.dumps(component)
        except ValueError as error:
            raise ValueError(
                f"{what} cannot be sent to other processes ({error}): train in one process with --serial, move its "
                "class into a module, or make what it holds at its first call"
            ) from error


def _refuse_what_cannot_be_held(role: str, table: RoleTable, count: int = 1) -> None:
    """On a cluster that we attach to, nodes may still come: there the deadline of `runtime.ready_seconds` tells."""
    asked = {"CPU": table.num_cpus, "GPU": table.num_gpus, **table.resources}
    asked = {name: amount * count for name, amount in asked.items()}
    available = ray.cluster_resources()
    lacking = [name for name, amount in asked.items() if amount > available.get(name, 0)]
    if lacking and not attaches():
        who = "one asks" if count == 1 else f"its {count} ranks ask"
        asks = ", ".join(f"{name} {asked[name]:g}" for name in lacking)
        has = ", ".join(f"{name} {available.get(name, 0):g}" for name in lacking)
        keys = ", ".join({"CPU": "num_cpus", "GPU": "num_gpus"}.get(name, f"resources.{name}") for name in lacking)
        raise ValueError(
            f"{role}: {who} for {asks}, and the whole cluster has {has}: lower the role's {keys}, or set RAY_ADDRESS to a "
            "cluster that is large enough"
        )


def _refuse_what_does_not_fit_together(recipe: Recipe) -> None:
    """Raise ValueError if all roles ask for more GPUs than a cluster has that no node can join."""
    have = ray.cluster_resources().get("GPU", 0)
    asked = {"learner": recipe.learner.num_gpus * recipe.learner.world_size}
    asked |= {role: table.num_gpus * table.count for role, table in elastic_roles(recipe).items()}
    total = sum(asked.values())
    if total > have + 1e-9 and not attaches():
        parts = " + ".join(f"{role} {gpus:g}" for role, gpus in asked.items() if gpus)
        raise ValueError(
            f"all roles ask for {total:g} GPUs = {parts}, and there are {have:g}: lower samplers.count or a role's num_gpus, or "
            "set RAY_ADDRESS to a cluster that is large enough"
        )
