"""Which reward workers score which rewards: a pool of `[reward_workers]`, one for each reward with workers of its own, and
one of the scorers that are only looked at.
"""

from dataclasses import dataclass

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import ElasticTable, RewardPoolTable

SHARED = "reward_workers"
SCORERS = "evaluation.workers"


@dataclass(frozen=True)
class RewardPool:
    """Workers that are all alike: they hold the same rewards."""

    name: str  # SHARED, SHARED.<reward>, or SCORERS
    rewards: tuple[str, ...]
    table: RewardPoolTable

    @property
    def trains(self) -> bool:
        """Whether what is learned from is scored here."""
        return self.name != SCORERS


def reward_pools(recipe: Recipe) -> tuple[RewardPool, ...]:
    """The pools that score what is learned from; the shared one first, unless every reward has workers of its own."""
    shared = tuple(table.called for table in recipe.all_rewards if table.workers is None)
    pools = [RewardPool(SHARED, shared, recipe.reward_workers)] if shared else []
    own = [(table.called, table.workers) for table in recipe.all_rewards if table.workers is not None]
    return (*pools, *(RewardPool(f"{SHARED}.{name}", (name,), workers) for name, workers in own))


def all_pools(recipe: Recipe) -> tuple[RewardPool, ...]:
    """Those, and that of the scorers where there are any to be asked while it trains."""
    table = recipe.evaluation
    scorers = tuple(scorer.called for scorer in table.scorers)
    return (*reward_pools(recipe), *([RewardPool(SCORERS, scorers, table.workers)] if table.every and scorers else []))


def refused(roles: dict[str, ElasticTable], role: str, count: int) -> str | None:
    """Why there cannot be `count` of a role, in words; None: there can."""
    if role not in roles:
        return f"this run has no {role}: it has {', '.join(roles)}"
    table = roles[role]
    if count < table.min or (table.max is not None and count > table.max):
        bounds = f"{role}.min = {table.min} and {role}.max = {table.max or 'none'}"
        return f"{role} is {count}: it must lie between {bounds}"
    return None


def elastic_roles(recipe: Recipe) -> dict[str, ElasticTable]:
    """What `ddpo scale` may change in number, by name."""
    return {"samplers": recipe.samplers, **{pool.name: pool.table for pool in all_pools(recipe)}}
