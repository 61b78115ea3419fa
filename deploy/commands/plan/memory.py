"""What of a recipe fits on which GPU: predicted peaks against the sizes that GPUs are sold with."""

from ray_ddpo.common.diffusion.memory.sizes import largest_divisor, usable_bytes
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools
from ray_ddpo.deploy.commands.plan.numbers import Plan, device_of

GIGABYTES = (8, 12, 16, 24, 40, 80)


def gpu_rows(recipe: Recipe, numbers: Plan) -> list[tuple[str, str]]:
    """Rows of the plan: by a GPU's gigabytes, the largest micro-batch and task that fit; none where no GPU is asked for."""
    if device_of(recipe) == "cpu":
        return []
    rows = {
        "a GPU of so many GB": [f"{size}" for size in GIGABYTES],
        "learner alone: micro-batch": [_or_none(largest_micro_batch(numbers, size)) for size in GIGABYTES],
        "sampler alone: images a task": [_or_none(largest_task(numbers, size)) for size in GIGABYTES],
    }
    if numbers.ranks == 1:  # several have a GPU each
        beside = _beside_learner(recipe, numbers)
        together = [_or_none(largest_micro_batch(numbers, size, *beside)) for size in GIGABYTES]
        rows["all roles on one: micro-batch"] = together
    return [(name, "".join(f"{value:>6}" for value in values).lstrip()) for name, values in rows.items()]


def _or_none(count: int) -> str:
    return f"{count}" if count else "-"


def _beside_learner(recipe: Recipe, numbers: Plan) -> tuple[int, int]:
    """Processes on the GPU, and bytes of those that are not the learner."""
    pools = [pool for pool in all_pools(recipe) if pool.table.num_gpus]
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    samplers = recipe.samplers.count
    return 1 + samplers + sum(pool.table.count for pool in pools), numbers.sampler_bytes * samplers + scoring


def largest_micro_batch(numbers: Plan, gigabytes: int, processes: int = 1, others: int = 0) -> int:
    """The largest divisor of a rank's pairs of an optimizer step that fits on a GPU, beside other bytes; 0: not one pair."""
    free = usable_bytes(gigabytes * 2**30, processes) - others - numbers.conditioning_bytes - numbers.reduced_bytes
    return largest_divisor(numbers.pairs_per_rank, numbers.sizes.learner.largest(free))


def largest_task(numbers: Plan, gigabytes: int) -> int:
    """The most images a task that a sampler alone on a GPU samples; 0: not one."""
    return numbers.sizes.largest_batch(usable_bytes(gigabytes * 2**30))
