"""Compare the resources that the recipe's roles ask for with those of the machines. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ddpo.common.diffusion.memory.sizes import CONTEXT_BYTES
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import elastic_roles
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.deploy.commands.doctor.checks import Finding, compared
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes

Resources = dict[str, float]  # of a node, by Ray's names
LITTLE = 1e-9  # rounding error of a sum of fractions
STORE_SHARE = 0.3  # of a machine's memory, for Ray's object store
LIBRARY_BYTES = 450_000_000  # a process that has imported torch, diffusers and ray, without weights


@dataclass(frozen=True)
class Role:
    """`count` actors of a role, of which `least` must run before the run begins."""

    name: str
    table: RoleTable
    count: int
    least: int
    actor_bytes: int = 0  # memory of one actor on its device

    @property
    def asks(self) -> Resources:
        """Return the resources that one actor asks for, by Ray's names."""
        asked = {"CPU": self.table.num_cpus, "GPU": self.table.num_gpus, **self.table.resources}
        if self.table.accelerator_type:
            asked[f"accelerator_type:{self.table.accelerator_type}"] = 0.001  # the amount that Ray uses
        return {name: amount for name, amount in asked.items() if amount}


@dataclass(frozen=True)
class FreeMemory:
    """Free memory of this machine, in bytes."""

    memory: int
    gpu_memory: tuple[int, ...]


def roles_of(recipe: Recipe, numbers: Plan | None = None) -> tuple[Role, ...]:
    """Return the roles in the order in which a run starts them. Their memory is known if there is a plan."""
    elastic = {"samplers": numbers.sampler_bytes, **numbers.reward_worker_bytes} if numbers else {}
    return (
        Role(
            "learner",
            recipe.learner,
            recipe.learner.world_size,
            recipe.learner.world_size,
            numbers.learner_bytes if numbers else 0,
        ),
        *(
            Role(name, table, table.count, table.min, elastic.get(name, 0))
            for name, table in elastic_roles(recipe).items()
        ),
    )


def place_findings(roles: tuple[Role, ...], nodes: list[Resources]) -> Iterator[Finding]:
    """Place the actors on the nodes in order. Report how many fit, and which resources a further actor lacks."""
    free = [dict(node) for node in nodes]
    for role in roles:
        placed = 0
        while placed < role.count and _take(role.asks, free):
            placed += 1
        asks = ", ".join(f"{name} {amount:g}" for name, amount in role.asks.items()) or "nothing"
        of_all = f"{placed} of {role.count} have a place"
        if placed == role.count:
            yield Finding("ok", role.name, f"{of_all}; each asks for {asks}")
            continue
        lacks = f"{of_all}: a further one asks for {asks}, and lacks {_lacking(role.asks, free)}"
        if placed < role.least:
            yield Finding("fault", role.name, lacks, f"add nodes, or let {role.name} ask for less")
        else:
            yield Finding("warning", role.name, lacks, f"lower {role.name}.count; those left join when nodes are added")


def _take(asks: Resources, free: list[Resources]) -> bool:
    for node in free:
        if all(node.get(name, 0) + LITTLE >= amount for name, amount in asks.items()):
            for name, amount in asks.items():
                node[name] -= amount
            return True
    return False


def _lacking(asks: Resources, free: list[Resources]) -> str:
    most = {name: max((node.get(name, 0) for node in free), default=0) for name in asks}
    short = [f"{name} (at most {most[name]:g} free)" for name in asks if most[name] + LITTLE < asks[name]]
    return ", ".join(short) or "a single node with all of it free"


def cores_finding(recipe: Recipe, cores: int) -> Finding:
    """Warn if actors would share cores. A cluster started here gets as many CPUs as the roles ask for."""
    learner, *actors = ((role.count, role.table.num_cpus) for role in roles_of(recipe))
    acting = sum(count * cpus for count, cpus in actors)
    overlap = recipe.max_policy_lag > 0 or recipe.learner.parts_per_round > 1
    learning = learner[0] * learner[1]
    at_once = acting + learning if overlap else max(acting, learning)
    found = f"{cores} here, and {at_once:g} CPUs are asked for by what works at once"
    if at_once > cores:
        advice = "it works, but they share the cores: lower samplers.count, or set RAY_ADDRESS to a cluster"
        return Finding("warning", "cores", found, advice)
    return Finding("ok", "cores", found)


def memory_findings(recipe: Recipe, numbers: Plan, machine: FreeMemory) -> Iterator[Finding]:
    """Compare the plan's bytes with this machine's memory, if all roles run on it."""
    roles = roles_of(recipe, numbers)
    processes = sum(role.count for role in roles) + 1
    on_cpu = sum(role.actor_bytes * role.count for role in roles if not role.table.num_gpus) + processes * LIBRARY_BYTES
    what = f"{in_bytes(on_cpu)} for {processes} processes with what they hold in main memory"
    yield compared("memory", what, on_cpu, machine.memory, "lower learner.micro_batch_size or samplers.count")
    if machine.gpu_memory and any(role.table.num_gpus for role in roles):
        fullest, memory = max(_gpu_loads(roles, machine.gpu_memory), key=lambda load: load[0] / load[1])
        advice = (
            "lower learner.micro_batch_size, set policy.gradient_checkpointing, or let fewer roles share a GPU "
            "(num_gpus)"
        )
        yield compared("GPU memory", f"{in_bytes(fullest)} on the fullest GPU", fullest, memory, advice)
    store = int(STORE_SHARE * machine.memory)
    found = f"{in_bytes(numbers.round_bytes)} of trajectories under way, and a store of about {in_bytes(store)}"
    if numbers.round_bytes > store:
        yield Finding(
            "warning", "object store", found, "it will spill to disk: lower batches_per_round, or latents_dtype"
        )
    else:
        yield Finding("ok", "object store", found)


def _gpu_loads(roles: tuple[Role, ...], memory: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (bytes, memory) of each GPU. An actor goes to the first GPU with enough of its share free, as in Ray."""
    free, loads = [1.0] * len(memory), [0] * len(memory)
    for role in roles:
        share = min(role.table.num_gpus, 1.0)  # an actor with several GPUs computes on one
        for _ in range(role.count if share else 0):
            place = next((index for index, left in enumerate(free) if left + LITTLE >= share), None)
            if place is not None:
                free[place] -= share
                loads[place] += role.actor_bytes + CONTEXT_BYTES
    return list(zip(loads, memory, strict=True))
