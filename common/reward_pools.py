"""Which reward workers score which rewards: a pool of `[reward_workers]`, and one for each reward with workers of its own."""

from dataclasses import dataclass

from common.config import Recipe
from common.recipe_tables import ElasticTable, RewardPoolTable

SHARED = "reward_workers"


@dataclass(frozen=True)
class RewardPool:
    """Workers that are all alike: they hold the same rewards."""

    name: str  # SHARED, or SHARED.<reward>
    rewards: tuple[str, ...]
    table: RewardPoolTable


def reward_pools(recipe: Recipe) -> tuple[RewardPool, ...]:
    """The pools of a recipe; the shared one first, unless every reward has workers of its own."""
    shared = tuple(table.called for table in recipe.all_rewards if table.workers is None)
    pools = [RewardPool(SHARED, shared, recipe.reward_workers)] if shared else []
    own = [(table.called, table.workers) for table in recipe.all_rewards if table.workers is not None]
    return (*pools, *(RewardPool(f"{SHARED}.{name}", (name,), workers) for name, workers in own))


def elastic_roles(recipe: Recipe) -> dict[str, ElasticTable]:
    """What `ddpo scale` may change in number, by name."""
    return {"samplers": recipe.samplers, **{pool.name: pool.table for pool in reward_pools(recipe)}}
