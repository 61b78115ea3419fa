"""Compare the resources that the recipe's roles ask for with those of the machines. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

from ray_ddpo.common.diffusion.memory.sizes import CONTEXT_BYTES
from ray_ddpo.common.recipe.colocation import LITTLE, asked, pair_resources
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import elastic_roles
from ray_ddpo.common.recipe.tables import LearnerTable, RoleTable, SamplersTable
from ray_ddpo.deploy.commands.doctor.checks import Finding, compared
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes, shares_gpus

Resources = dict[str, float]  # of a node, by Ray's names
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
    processes: int = 1  # of one actor; 2 for a learner rank with the sampler that shares its GPU

    @property
    def asks(self) -> Resources:
        """Return the resources that one actor asks for, by Ray's names."""
        return asked(self.table)

    @property
    def takes(self) -> Resources:
        """Return the resources that must be free for one actor."""
        return self.asks


@dataclass(frozen=True)
class PairRole(Role):
    """Learner ranks, each with the sampler that shares its GPU. They have one place together."""

    samplers: SamplersTable = SamplersTable()

    @property
    def asks(self) -> Resources:
        """Return the resources that rank and sampler ask for together."""
        assert isinstance(self.table, LearnerTable), "the samplers are beside it"
        return pair_resources(self.table, self.samplers)

    @property
    def takes(self) -> Resources:
        """Return the resources that must be free for a pair. No two pairs are on one GPU, whatever they ask for."""
        return {name: 1.0 if name == "GPU" else amount for name, amount in self.asks.items()}


@dataclass(frozen=True)
class FreeMemory:
    """Free memory of this machine, in bytes."""

    memory: int
    gpu_memory: tuple[int, ...]


def roles_of(recipe: Recipe, numbers: Plan | None = None) -> tuple[Role, ...]:
    """Return the roles in the order in which a run starts them. Their memory is known if there is a plan."""
    bytes_of = {"samplers": numbers.sampler_bytes, **numbers.reward_worker_bytes} if numbers else {}
    elastic, learner, ranks = elastic_roles(recipe), recipe.learner, recipe.learner.world_size
    held = numbers.learner_bytes if numbers else 0
    first = Role("learner", learner, ranks, ranks, held)
    if learner.colocated:
        del elastic["samplers"]
        held += numbers.sampler_bytes if numbers else 0
        if numbers and shares_gpus(recipe):
            held = numbers.pair_bytes
        first = PairRole("learner+sampler", learner, ranks, ranks, held, 2, recipe.samplers)
    others = (Role(name, table, table.count, table.min, bytes_of.get(name, 0)) for name, table in elastic.items())
    return first, *others


def place_findings(roles: tuple[Role, ...], nodes: list[Resources]) -> Iterator[Finding]:
    """Place the actors on the nodes in order. Report how many fit, and which resources a further actor lacks."""
    free = [dict(node) for node in nodes]
    for role in roles:
        taken: list[Resources] = []
        while len(taken) < role.count and (node := _take(role.takes, free)) is not None:
            taken.append(node)
        yield _place_finding(role, len(taken), free)
        for node in taken:  # the rest of a pair's GPU is free for other roles
            node.update({name: node[name] + amount - role.asks[name] for name, amount in role.takes.items()})


def _place_finding(role: Role, placed: int, free: list[Resources]) -> Finding:
    """Report how many of a role's actors have a place, and what a further one lacks among the free resources."""
    asks = ", ".join(f"{name} {amount:g}" for name, amount in role.asks.items()) or "nothing"
    of_all = f"{placed} of {role.count} have a place"
    if placed == role.count:
        return Finding("ok", role.name, f"{of_all}; each asks for {asks}")
    lacks = f"{of_all}: a further one asks for {asks}, and lacks {_lacking(role.takes, free)}"
    if placed < role.least:
        return Finding("fault", role.name, lacks, f"add nodes, or let {role.name} ask for less")
    return Finding("warning", role.name, lacks, f"lower {role.name}.count; those left join when nodes are added")


def _take(asks: Resources, free: list[Resources]) -> Resources | None:
    """Take an actor's resources from the first node that has them, and return that node."""
    for node in free:
        if all(node.get(name, 0) + LITTLE >= amount for name, amount in asks.items()):
            for name, amount in asks.items():
                node[name] -= amount
            return node
    return None


def _lacking(asks: Resources, free: list[Resources]) -> str:
    most = {name: max((node.get(name, 0) for node in free), default=0) for name in asks}
    short = [f"{name} (at most {most[name]:g} free)" for name in asks if most[name] + LITTLE < asks[name]]
    return ", ".join(short) or "a single node with all of it free"


def cores_finding(recipe: Recipe, cores: int) -> Finding:
    """Warn if actors would share cores. A cluster started here gets as many CPUs as the roles ask for."""
    acting = sum(table.count * table.num_cpus for table in elastic_roles(recipe).values())
    overlap = recipe.max_policy_lag > 0 or recipe.learner.parts_per_round > 1
    learning = recipe.learner.world_size * recipe.learner.num_cpus
    at_once = acting + learning if overlap else max(acting, learning)
    found = f"{cores} here, and {at_once:g} CPUs are asked for by what works at once"
    if at_once > cores:
        advice = "it works, but they share the cores: lower samplers.count, or set RAY_ADDRESS to a cluster"
        return Finding("warning", "cores", found, advice)
    return Finding("ok", "cores", found)


def memory_findings(recipe: Recipe, numbers: Plan, machine: FreeMemory) -> Iterator[Finding]:
    """Compare the plan's bytes with this machine's memory, if all roles run on it."""
    roles = roles_of(recipe, numbers)
    processes = sum(role.count * role.processes for role in roles) + 1
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
        share = min(role.asks.get("GPU", 0.0), 1.0)  # an actor with several GPUs computes on one
        for _ in range(role.count if share else 0):
            place = next((index for index, left in enumerate(free) if left + LITTLE >= share), None)
            if place is not None:
                free[place] -= share
                loads[place] += role.actor_bytes + role.processes * CONTEXT_BYTES
    return list(zip(loads, memory, strict=True))
