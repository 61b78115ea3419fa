"""Start samplers, reward workers and learner: as actors on a Ray cluster, or in this process."""

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
from ray_ddpo.common.policy_weights import weights_of
from ray_ddpo.common.process_deaths import LOADING, Death, in_one_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import RewardPool, all_pools, elastic_roles
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.common.role_loading import RoleNotStarted, starting
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import Task
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.deploy.driver.cluster import attach, attaches, start_here
from ray_ddpo.deploy.driver.cluster_watch import ClusterWatch
from ray_ddpo.deploy.driver.colocated_pairs import Options, Pairs, refuse_too_many_pairs
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import gpus_of
from ray_ddpo.deploy.driver.reaper import start_reaper
from ray_ddpo.deploy.driver.reward_prompts import check_rewards_prompts
from ray_ddpo.deploy.driver.role_actor import RoleSetting, role_actor
from ray_ddpo.deploy.driver.role_output import DeathLines, RoleOutput
from ray_ddpo.deploy.driver.round_work import ImageWork, counted_work
from ray_ddpo.deploy.driver.supervision import Supervision, sheltered_from_hangup
from ray_ddpo.deploy.driver.trial_prompts import checked_prompts, trial_prompts
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.learner_group import LearnerGroup, SerialLearnerGroup
from ray_ddpo.learner.process_group import process_groups
from ray_ddpo.learner.ray_learner_group import RayLearnerGroup
from ray_ddpo.learner.sharding.layout import shards_weights

SAMPLER_SECONDS = 10.0  # after a learner failed to start: wait for a sampler that may fail with the same error


@dataclass(frozen=True)
class Workers:
    """Rollout stream and learner, as the driver uses them."""

    stream: RolloutStream
    learner: LearnerGroup
    pools: tuple[WorkerPool, ...] = ()
    reporters: tuple[DeathLines | RoleOutput, ...] = ()
    supervision: Supervision | None = None
    pairs: Pairs | None = None
    work: ImageWork | None = None  # operations per image; None: the family cannot be counted

    def submit(self, tasks: list[Task]) -> None:
        """Submit a round's tasks with the weights of the version that they are sampled with."""
        self.stream.submit(tasks, weights_of(self.learner.weights(), tasks[0].policy_version))

    def close(self) -> None:
        """End the actors, and wait for the rest of their output.

        If the cluster is lost, the actors end together with this process, which owns them.
        """
        if self.supervision is not None and self.supervision.cluster_is_lost:
            return
        self.learner.close()
        for pool in self.pools:
            pool.close()
        if self.pairs is not None:
            self.pairs.close()
        for each in self.reporters:
            each.close()


def serial_workers(components: Components, supervision: Supervision, base: LoadedBase) -> Workers:
    """Create all roles in this process, for debugging.

    Raises:
        ValueError: the learner has several ranks, or the loaded files are not those of `base`.
    """
    recipe = components.recipe
    if recipe.learner.world_size > 1:
        raise ValueError(
            f"learner.world_size is {recipe.learner.world_size} and --serial has one process: leave --serial out, "
            "or give --learner.world_size 1"
        )
    tried_on = trial_prompts(components)
    check_rewards_prompts(components)
    with starting("sampler"):
        checked = checked_prompts(components)
        sampler = Sampler(
            components.policy, recipe.sampling, recipe.runtime, tried_on, checked, components.image_source
        )
    pools = tuple(_serial_pool(components, pool, base) for pool in all_pools(recipe))
    with starting("learner"):
        learner = Learner(components.policy, components.algorithm, recipe)
    base.take("learner", learner.loaded_parts())
    base.take("sampler", sampler.loaded_parts())
    stream = SerialRolloutStream(sampler, pools, _settings(recipe, supervision))
    return Workers(stream, SerialLearnerGroup(learner), work=counted_work(components))


def _serial_pool(components: Components, pool: RewardPool, base: LoadedBase) -> SerialPool:
    with starting(_in_words(pool)):
        frames = components.frame_scoring
        worker = RewardWorker(components.rewards_of(pool), pool.table, components.recipe.runtime, True, frames)
    base.take(_in_words(pool), worker.loaded_parts())
    return SerialPool(worker, pool.table, pool.trains)


def _in_words(pool: RewardPool) -> str:
    return "reward worker" if pool.trains else "scorer"


def ray_workers(components: Components, supervision: Supervision, base: LoadedBase) -> Workers:
    """Start the actors of all roles, on the cluster that RAY_ADDRESS names or on a cluster started here.

    Raises:
        ValueError: the cluster has no resources for a role, a role was not ready in time, or the files that a role has
            loaded are not those of `base`.
    """
    recipe = components.recipe
    trial_prompts(components)  # so that a faulty prompt source is found before any process starts
    check_rewards_prompts(components)
    _refuse_what_cannot_travel(components)
    output = RoleOutput(RunFolder(recipe.run_path()).logs)
    connect(recipe, output)
    supervision.listen()
    supervision.watch(ClusterWatch(supervision.lose_cluster, own_cluster=not attaches()))
    _refuse_too_large_role("learner", recipe.learner, recipe.learner.world_size)
    for role, table in elastic_roles(recipe).items():
        _refuse_too_large_role(role, table)
    _refuse_too_many_gpus(recipe)
    budget, lines = RestartBudget(recipe.runtime.max_restarts), DeathLines(output)
    pairs = _placed_pairs(recipe, supervision)
    # The learner starts first: on a cluster that is too small for all roles, it must get its resources.
    make_learner = _learner_maker(components, pairs)
    learner_actors = make_learner()
    scoring = tuple(_reward_workers(components, pool, budget, lines) for pool in all_pools(recipe))
    pools = Pools(_samplers(components, budget, lines, pairs), scoring, budget)
    for pool in pools.all:
        pool.on_loaded = base.take
    stream = RayRolloutStream(pools, _settings(recipe, supervision))
    on_death = functools.partial(_learner_died, budget, lines)
    shards = shards_weights(recipe.learner)
    learner = RayLearnerGroup(
        learner_actors, make_learner, stream.keep_busy_until_ready, on_death, recipe.kept_lag, shards
    )
    learner.on_loaded = base.take
    learner.turn = stream.learner_turn if pairs else None
    work = counted_work(components)  # while the actors load
    workers = Workers(stream, learner, pools.all, (lines, output), supervision, pairs, work)
    with contextlib.ExitStack() as unless_loaded:
        unless_loaded.callback(workers.close)
        _wait_until_loaded(recipe, stream, learner)
        unless_loaded.pop_all()
    supervision.on_scale = {pool.name: pool.scale for pool in pools.all}
    return workers


def _placed_pairs(recipe: Recipe, supervision: Supervision) -> Pairs | None:
    """Find GPUs for pairs of a learner rank and a sampler, if the recipe wants them. ValueError: there are none."""
    if not recipe.learner.colocated:
        return None
    refuse_too_many_pairs(recipe)
    pairs = Pairs(recipe)
    pairs.wait(recipe.runtime.ready_seconds, supervision.check)
    return pairs


def _wait_until_loaded(recipe: Recipe, stream: RayRolloutStream, learner: RayLearnerGroup) -> None:
    """Wait until all roles are loaded. Raise RoleNotStarted if a role cannot start, as in one process."""
    try:
        learner.wait_until_loaded()
    except RoleNotStarted:
        # In one process, samplers load first: if no role can load the model, report the sampler's error here too.
        with contextlib.suppress(TimeoutError):
            stream.wait_for_one(stream.samplers, SAMPLER_SECONDS)
        raise
    stream.wait_until_loaded({name: table.min for name, table in elastic_roles(recipe).items()})


def _learner_died(budget: RestartBudget, lines: DeathLines, death: Death) -> None:
    who = "the learner" if death.number is None else f"learner-{death.number}"
    lines.tell(who, death, "the learner is started again from the last completed round")
    budget.spend("learner", in_one_line(death.reason), LOADS_TRIED if death.at == LOADING else None)


def _samplers(
    components: Components, budget: RestartBudget, lines: DeathLines, pairs: Pairs | None = None
) -> WorkerPool:
    """Create the pool of samplers. Only the first reports truncated prompts. With `pairs`, each is beside a rank."""
    table, recipe = components.recipe.samplers, components.recipe
    arguments = (components.policy, recipe.sampling, recipe.runtime, trial_prompts(components))
    make_first, make_other = (
        _maker(Sampler, "sampler", table, recipe, (*arguments, checked, components.image_source))
        for checked in (checked_prompts(components), ())
    )

    def make(number: int) -> Any:
        return (make_other if number else make_first)(number, pairs.of_sampler(number) if pairs else None)

    on_gone = pairs.free if pairs else lambda number: None
    return _reporting(lines, "sampler", WorkerPool("samplers", "sampler", make, table.count, budget, on_gone))


def _reward_workers(components: Components, pool: RewardPool, budget: RestartBudget, lines: DeathLines) -> ScoringPool:
    recipe, rewards = components.recipe, components.rewards_of(pool)
    name = pool.name.replace("reward_workers", "reward-worker").replace(".", "-") if pool.trains else "scorer"
    keys = (rewards, pool.table, recipe.runtime, True, components.frame_scoring)
    make = _maker(RewardWorker, name, pool.table, recipe, keys, _in_words(pool))
    independent = all(reward.independent_of_batch for reward in rewards.values())
    workers = WorkerPool(pool.name, "reward_worker" if pool.trains else "scorer", make, pool.table.count, budget)
    return ScoringPool(_reporting(lines, name, workers), pool.rewards, pool.table, independent, pool.trains)


def _reporting(lines: DeathLines, name: str, pool: WorkerPool) -> WorkerPool:
    """Report the deaths of a pool's workers on the terminal; return the pool."""
    pool.on_death = lambda death: lines.tell(f"{name}-{death.number}", death, "another is started in its place")
    return pool


def _settings(recipe: Recipe, supervision: Supervision) -> StreamSettings:
    return StreamSettings(recipe.runtime, recipe.samplers.straggler_factor, supervision.check)


def connect(recipe: Recipe, output: RoleOutput) -> None:
    """Attach to the cluster of RAY_ADDRESS, or start one on this machine that is large enough for the recipe.

    Output of roles goes to `output`, unless this process is already attached to a cluster.

    Raises:
        ValueError: RAY_ADDRESS or TMPDIR prevents it.
    """
    # Otherwise, if one call ends the run with an error, Ray prints the tracebacks of all other pending calls.
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
    """Return the resources of a role's actor as Ray's options."""
    options: dict[str, Any] = {"num_cpus": table.num_cpus, "num_gpus": table.num_gpus, "resources": table.resources}
    if table.accelerator_type:
        options["accelerator_type"] = table.accelerator_type
    return options


def _maker(
    cls: type, name: str, table: RoleTable, recipe: Recipe, arguments: tuple[Any, ...], role: str | None = None
) -> Callable[..., Any]:
    """Return a function that starts an actor of a role by number, with further options of Ray if any are given.

    The driver owns the actor, which ends with the driver. Every actor states its resources, so that an autoscaler knows
    which resources are missing.

    Args:
        cls: the role's class.
        name: with the run's name and the number, it names the actor.
        table: the resources.
        recipe: the recipe.
        arguments: of the constructor.
        role: the role in words, for errors; by default `name`.
    """
    options = place_options(table)
    # A separate thread answers health checks while the actor works; work calls stay sequential and in order.
    options["concurrency_groups"] = {"health": 1}
    remote, given = ray.remote(**options)(role_actor(cls)), ray.put(arguments)
    path, sees_gpus = f"{cls.__module__}:{cls.__qualname__}", table.num_gpus > 0

    def make(number: int, options: Options | None = None) -> Any:
        setting = RoleSetting(f"{name}-{number}", role or name, path, sees_gpus)
        return remote.options(name=f"{recipe.name}/{name}-{number}", **(options or {})).remote(setting, [given])

    return make


def _learner_maker(components: Components, pairs: Pairs | None) -> Callable[[], list[Any]]:
    """Return a function that starts all ranks of the learner, rank 0 first. Restarted ranks get new numbers."""
    recipe, numbers, makers = components.recipe, itertools.count(), []
    for ranks in process_groups(recipe):
        role = f"learner {ranks}" if ranks.world_size > 1 else "learner"
        arguments = (components.policy, components.algorithm, recipe, ranks)
        makers.append(_maker(Learner, "learner", recipe.learner, recipe, arguments, role))
    places = [pairs.of_rank(rank) if pairs else None for rank in range(len(makers))]
    return lambda: [make(next(numbers), place) for make, place in zip(makers, places, strict=True)]


def _refuse_what_cannot_travel(components: Components) -> None:
    """Raise ValueError if a component cannot be sent to another process, such as a function that holds an open file."""
    rewards = {f"the reward {name!r}": reward for name, reward in (components.rewards | components.scorers).items()}
    for what, component in {**rewards, "the algorithm": components.algorithm, "the policy": components.policy}.items():
        try:
            with blamed("pickling it"):
                cloudpickle.dumps(component)
        except ValueError as error:
            raise ValueError(
                f"{what} cannot be sent to other processes ({error}): train in one process with --serial, move its "
                "class into a module, or make what it holds at its first call"
            ) from error


def _refuse_too_large_role(role: str, table: RoleTable, count: int = 1) -> None:
    """Raise ValueError if the cluster is too small for `count` actors of a role.

    On a cluster that was started elsewhere, nodes may still join, so only `runtime.ready_seconds` ends the wait there.
    """
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
            f"{role}: {who} for {asks}, and the whole cluster has {has}: lower the role's {keys}, or set "
            "RAY_ADDRESS to a cluster that is large enough"
        )


def _refuse_too_many_gpus(recipe: Recipe) -> None:
    """Raise ValueError if all roles together ask for more GPUs than a cluster started here has."""
    have = ray.cluster_resources().get("GPU", 0)
    asked = {"learner": recipe.learner.num_gpus * recipe.learner.world_size}
    asked |= {role: table.num_gpus * table.count for role, table in elastic_roles(recipe).items()}
    total, needed = sum(asked.values()), gpus_of(recipe)
    if max(total, needed) > have + 1e-9 and not attaches():
        parts = " + ".join(f"{role} {gpus:g}" for role, gpus in asked.items() if gpus)
        whole = f", which fit on {needed}" if needed > total + 1e-9 else ""
        raise ValueError(
            f"all roles ask for {total:g} GPUs = {parts}{whole}, and there are {have:g}: lower samplers.count or a role's "
            "num_gpus, or set RAY_ADDRESS to a cluster that is large enough"
        )
