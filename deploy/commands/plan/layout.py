"""Layouts of N GPUs for a recipe, the fastest first: the keys that make each, and whether it fits in memory."""

from dataclasses import dataclass, replace

from ray_ddpo.common.balance import Layout, RoundLoad, expected, layouts
from ray_ddpo.common.diffusion.memory.sizes import usable_bytes
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools
from ray_ddpo.deploy.commands.plan.numbers import plan_of_components
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import LITTLE, Keys, gpus_of, keys_of, kind_of, reward_gpus, reward_share
from ray_ddpo.learner.sharding_check import check_sharding

REFUSED = "the recipe's rules do not allow it: "


@dataclass(frozen=True)
class Candidate:
    """A layout with the keys that make it, and the reason if it does not fit."""

    layout: Layout
    keys: Keys
    misfit: str | None = None

    @property
    def lacks_memory(self) -> bool:
        """Return whether the recipe's rules allow the layout, and memory does not."""
        return self.misfit is not None and not self.misfit.startswith(REFUSED)


def layout_of(recipe: Recipe, load: RoundLoad) -> Layout:
    """Return the layout that a recipe asks for. Roles that fit beside each other on the same GPUs work in turns."""
    kind, gpus = kind_of(recipe), gpus_of(recipe)
    ranks, samplers = recipe.learner.world_size, recipe.samplers.count
    if kind == "colocated":  # more processes than GPUs do not compute faster
        ranks, samplers = min(ranks, gpus), min(samplers, gpus)
    return expected(load, samplers, ranks, kind, gpus)


def candidates(components: Components, load: RoundLoad, gpus: int, gigabytes: float | None) -> list[Candidate]:
    """Return the layouts of `gpus` GPUs, the fastest first, each with its keys and whether it fits in memory.

    Args:
        components: of the recipe.
        load: a round's load.
        gpus: number of GPUs, for all roles together.
        gigabytes: memory of each. None: memory is not compared.

    Raises:
        ValueError: reward workers and scorers leave no GPU to samplers and learner.
    """
    recipe = components.recipe
    shared = reward_share(recipe)
    own = reward_gpus(recipe, gpus)
    if gpus - own < 1:
        raise ValueError(
            f"--gpus is {gpus}, and reward workers and scorers ask for {shared:g}: give more GPUs, or a smaller num_gpus "
            "of theirs"
        )
    found = []
    for layout in layouts(load, gpus - own, recipe.samplers.max):
        keys = keys_of(layout, 0.0 if own else shared)
        if recipe.samplers.max is not None and keys["learner"].get("colocated"):
            keys["samplers"]["max"] = layout.samplers  # no sampler can be added to pairs
        found.append(Candidate(layout, keys, misfit(with_keys(recipe, keys), components, gigabytes)))
    return found


def with_keys(recipe: Recipe, keys: Keys) -> Recipe | ValueError:
    """Return the recipe with these keys, or the error if it does not allow them."""
    tables = recipe.model_dump()
    for table, values in keys.items():
        tables[table] |= values
    try:
        return Recipe.parse(tables)
    except ValueError as error:
        return error


def misfit(recipe: Recipe | ValueError, components: Components, gigabytes: float | None) -> str | None:
    """Return why a recipe's roles do not fit on GPUs of this size, as they share them; None if they fit."""
    if isinstance(recipe, ValueError):
        return f"{REFUSED}{recipe}"
    try:
        check_sharding(recipe, components.policy)
    except ValueError as error:
        return f"{REFUSED}{error}"
    if gigabytes is None:
        return None
    numbers = plan_of_components(replace(components, recipe=recipe))
    pools = [pool for pool in all_pools(recipe) if pool.table.num_gpus]
    pools, shared = [pool for pool in all_pools(recipe) if pool.table.num_gpus], reward_share(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    workers = sum(pool.table.count for pool in pools)
    together = recipe.learner.num_gpus + recipe.samplers.num_gpus <= 1 + LITTLE
    beside_rank = recipe.learner.num_gpus <= 1 - shared + LITTLE  # where reward workers find room
    beside_sampler = not beside_rank and recipe.samplers.num_gpus <= 1 - shared + LITTLE
    held = {
        "learner": numbers.learner_bytes + scoring * beside_rank + numbers.sampler_bytes * together,
        "sampler": numbers.sampler_bytes + scoring * beside_sampler,
    }
    processes = {"learner": 1 + workers * beside_rank + together, "sampler": 1 + workers * beside_sampler}
    for role, size in held.items():
        usable = max(0.0, usable_bytes(gigabytes * 2**30, processes[role]))
        if size > usable:
            return f"the GPU of a {role} needs {size / 1e9:.1f} GB of tensors, and {usable / 1e9:.1f} GB may be used"
    return None
