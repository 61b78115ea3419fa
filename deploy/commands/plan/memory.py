"""Largest micro-batch and task that fit on GPUs of usual sizes; `common/diffusion/memory` predicts the peaks."""

from ray_ddpo.common.diffusion.memory.sizes import largest_divisor, usable_bytes
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools
from ray_ddpo.deploy.commands.plan.numbers import Plan, device_of

GIGABYTES = (8, 12, 16, 24, 40, 80)


def gpu_rows(recipe: Recipe, numbers: Plan) -> list[tuple[str, str]]:
    """Return rows of the plan: the largest micro-batch and task by GPU memory. Empty if the recipe uses no GPU."""
    if device_of(recipe) == "cpu":
        return []
    rows = {
        "GPU memory in GB": [f"{size}" for size in GIGABYTES],
        "learner alone: micro-batch": [_or_none(largest_micro_batch(numbers, size)) for size in GIGABYTES],
        "sampler alone: images per task": [_or_none(largest_task(numbers, size)) for size in GIGABYTES],
    }
    if numbers.ranks == 1:  # several ranks have a GPU each
        beside = _beside_learner(recipe, numbers)
        together = [_or_none(largest_micro_batch(numbers, size, *beside)) for size in GIGABYTES]
        rows["all roles on one: micro-batch"] = together
    return [(name, "".join(f"{value:>6}" for value in values).lstrip()) for name, values in rows.items()]


def _or_none(count: int) -> str:
    return f"{count}" if count else "-"


def _beside_learner(recipe: Recipe, numbers: Plan) -> tuple[int, int]:
    """Return the number of processes on a shared GPU, and the bytes of all but the learner."""
    pools = [pool for pool in all_pools(recipe) if pool.table.num_gpus]
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    samplers = recipe.samplers.count
    return 1 + samplers + sum(pool.table.count for pool in pools), numbers.sampler_bytes * samplers + scoring


def largest_micro_batch(numbers: Plan, gigabytes: int, processes: int = 1, others: int = 0) -> int:
    """Return the largest micro-batch that fits on a GPU: a divisor of a rank's transitions per optimizer step.

    Args:
        numbers: the plan.
        gigabytes: memory of the GPU.
        processes: number of processes on the GPU.
        others: bytes of all processes but the learner.

    Returns:
        The micro-batch size, or 0 if not even one transition fits.
    """
    free = usable_bytes(gigabytes * 2**30, processes) - others - numbers.conditioning_bytes - numbers.reduced_bytes
    return largest_divisor(numbers.pairs_per_rank, numbers.sizes.learner.largest(free))


def largest_task(numbers: Plan, gigabytes: int) -> int:
    """Return the largest task, in images, of a sampler that has a GPU to itself; 0 if not even one image fits."""
    return numbers.sizes.largest_batch(usable_bytes(gigabytes * 2**30))
