"""Pools of reward workers: the shared one of `[reward_workers]`, those of single rewards, and the scorers'."""

from dataclasses import dataclass

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import ElasticTable, RewardPoolTable

SHARED = "reward_workers"
SCORERS = "evaluation.workers"


@dataclass(frozen=True)
class RewardPool:
    """Pool of reward workers that all hold the same rewards."""

    name: str  # SHARED, SHARED.<reward>, or SCORERS
    rewards: tuple[str, ...]
    table: RewardPoolTable

    @property
    def trains(self) -> bool:
        """Return whether this pool scores training images."""
        return self.name != SCORERS


def reward_pools(recipe: Recipe) -> tuple[RewardPool, ...]:
    """Return the pools that score training images: first the shared one, unless every reward has its own."""
    shared = tuple(table.called for table in recipe.all_rewards if table.workers is None)
    pools = [RewardPool(SHARED, shared, recipe.reward_workers)] if shared else []
    own = [(table.called, table.workers) for table in recipe.all_rewards if table.workers is not None]
    return (*pools, *(RewardPool(f"{SHARED}.{name}", (name,), workers) for name, workers in own))


def all_pools(recipe: Recipe) -> tuple[RewardPool, ...]:
    """Return the pools for training images and, if scorers run during training, theirs."""
    table = recipe.evaluation
    scorers = tuple(scorer.called for scorer in recipe.scorers)
    return (*reward_pools(recipe), *([RewardPool(SCORERS, scorers, table.workers)] if table.every and scorers else []))


def refused(recipe: Recipe, role: str, count: int) -> str | None:
    """Return why a role cannot have `count` actors, or None if it can."""
    roles = elastic_roles(recipe)
    if role not in roles:
        return f"this run has no {role}: it has {', '.join(roles)}"
    table = roles[role]
    if role == "samplers" and recipe.learner.colocated and count != table.count:
        return (
            f"samplers is {count}: with learner.colocated each of the {table.count} learner ranks shares its GPU with one "
            "sampler, so their number stays; the number of reward workers may change"
        )
    if count < table.min or (table.max is not None and count > table.max):
        bounds = f"{role}.min = {table.min} and {role}.max = {table.max or 'none'}"
        return f"{role} is {count}: it must lie between {bounds}"
    return None


def elastic_roles(recipe: Recipe) -> dict[str, ElasticTable]:
    """Return the tables of the roles whose number `ddpo scale` may change, by name."""
    return {"samplers": recipe.samplers, **{pool.name: pool.table for pool in all_pools(recipe)}}
