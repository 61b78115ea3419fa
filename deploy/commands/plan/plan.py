"""ddpo plan: print batch sizes, data volumes and memory of a recipe, before anything runs."""

import torch

from ray_ddpo.common.diffusion.memory.sizes import largest_divisor, usable_bytes
from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import SHARED, all_pools
from ray_ddpo.deploy.commands.plan.numbers import Plan, device_of, in_bytes, plan_of
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.numerics_notes import rows_note
from ray_ddpo.learner.optimization.optimizer import rank_optimizer_state_bytes

GIGABYTES = (8, 12, 16, 24, 40, 80)  # memory of GPUs of usual sizes
LITTLE = 1e-9  # rounding error of a sum of fractions

Rows = list[tuple[str, str]]  # name and value


def plan(recipe: Recipe) -> str:
    """Return the plan as lines of text."""
    with sizes_cache():
        numbers = plan_of(recipe)
    rows = [*_batch_rows(recipe, numbers), *_byte_rows(recipe, numbers), *_gpu_rows(recipe)]
    if note := rows_note(components_of(recipe)):
        rows.append(("note", note))
    rows += _fitting_rows(recipe, numbers)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _batch_rows(recipe: Recipe, numbers: Plan) -> Rows:
    """Return the numbers of images, steps and passes."""
    sampling, learner, ranks = recipe.sampling, recipe.learner, numbers.ranks
    chosen, each = numbers.images_learned_from, numbers.transitions_per_step // numbers.images_per_step
    learned_from = f"{chosen}" if chosen == numbers.images else f"about {chosen} selected"
    transitions = f"{each} noised samples" if numbers.forward_process else f"{each} of {sampling.num_steps} steps"
    size = learner.micro_batch_size
    rows = [
        ("images per round", f"{numbers.images} = {numbers.tasks} tasks × {sampling.batch_size}"),
        ("images in total", f"{numbers.images * recipe.rounds} in {recipe.rounds} rounds"),
        (
            "optimizer steps per round",
            f"{numbers.optimizer_steps} = {learned_from} / ({learner.batch_size} × "
            f"{learner.gradient_accumulation_steps} accumulated) × {learner.inner_epochs} inner epochs",
        ),
        (
            "transitions per optimizer step",
            f"{numbers.transitions_per_step} = {numbers.images_per_step} images × {transitions}, "
            f"in micro-batches {'found at the start' if size == 'auto' else f'of {size}'}",
        ),
    ]
    if ranks > 1:
        shares = f"{numbers.images_per_step // ranks} of {numbers.images_per_step} images"
        shares += f", {numbers.transitions_per_rank} of {numbers.transitions_per_step} transitions per optimizer step"
        summed = f"{in_bytes(numbers.broadcast_bytes)} per optimizer step, among {ranks} ranks"
        rows += [("each learner rank", shares), ("gradient all-reduce", summed)]
    return [*rows, ("learner forward passes per round", f"{numbers.forward_passes}")]


def _byte_rows(recipe: Recipe, numbers: Plan) -> Rows:
    """Return the bytes that the roles exchange and keep."""
    learner, sizes, one_rank, pools = recipe.learner, numbers.sizes, numbers.ranks == 1, all_pools(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    total = numbers.learner_bytes * numbers.ranks + numbers.sampler_bytes * recipe.samplers.count + scoring
    part = rank_optimizer_state_bytes(learner, sizes)
    per_rank = f", {in_bytes(part)} per rank" if part < numbers.optimizer_bytes else ""
    smallest = "; so with micro-batches of 1" if learner.micro_batch_size == "auto" else ""
    rows = [
        ("trained parameters", f"{sizes.trained_parameters:,} of {sizes.network_parameters:,}"),
        ("trajectory", f"{in_bytes(numbers.trajectory_bytes)} per image, {in_bytes(numbers.round_bytes)} in flight"),
        ("weight broadcast", f"{in_bytes(numbers.broadcast_bytes)} to each sampler's node, once per round"),
        ("optimizer state", f"{in_bytes(numbers.optimizer_bytes)} of {learner.optimizer}{per_rank}"),
        (
            "learner memory" if one_rank else "learner rank memory",
            f"{in_bytes(numbers.learner_bytes)} at most, {in_bytes(round(sizes.learner.each))} of it per transition"
            f"{smallest}",
        ),
    ]
    if numbers.copy_bytes:  # samplers and learner compute differently
        whose = "of it, in the host's memory" if one_rank else "of each rank, in its host's memory"
        why = "for a second copy of the network, which computes as samplers do and checks their log-probs"
        rows.append((whose, f"{in_bytes(numbers.copy_bytes)} {why}"))
    rows.append(
        ("sampler memory", f"{in_bytes(numbers.sampler_bytes)} at most, with tasks of {recipe.sampling.batch_size}")
    )
    for pool in pools:
        own = "" if pool.name == SHARED else f" ({', '.join(pool.rewards)})"
        name = f"{'reward worker' if pool.trains else 'scorer'} memory{own}"
        rows.append((name, in_bytes(numbers.reward_worker_bytes[pool.name])))
    return [*rows, ("total memory", f"{in_bytes(total)}: {', '.join(f'{n} {role}' for role, n, _ in _actors(recipe))}")]


def _gpu_rows(recipe: Recipe) -> Rows:
    """Return the GPUs that the recipe asks for, and those of this machine if they are fewer."""
    actors, here = _actors(recipe), torch.cuda.device_count()
    asked = sum(gpus for *_, gpus in actors)
    few = f"{here}, fewer than the recipe asks for: lower samplers.count or num_gpus, or set RAY_ADDRESS to a cluster"
    rows = [("requested GPUs", f"{asked:g} = {' + '.join(f'{role} {gpus:g}' for role, _, gpus in actors)}")]
    return [*rows, *([("GPUs here", few)] if 0 < here < asked - LITTLE else [])]


def _actors(recipe: Recipe) -> list[tuple[str, int, float]]:
    """Return for each role its name, the number of actors, and the GPUs of all of them."""
    pools, learner = all_pools(recipe), recipe.learner
    roles = {"samplers": [recipe.samplers], "reward workers": [pool.table for pool in pools if pool.trains]}
    if scorers := [pool.table for pool in pools if not pool.trains]:
        roles["scorers"] = scorers
    ranks = learner.world_size
    return [
        ("learner" if ranks == 1 else "learner ranks", ranks, ranks * learner.num_gpus),
        *(
            (role, sum(t.count for t in tables), sum(t.count * t.num_gpus for t in tables))
            for role, tables in roles.items()
        ),
    ]


def _fitting_rows(recipe: Recipe, numbers: Plan) -> Rows:
    """Return the largest micro-batch and task by GPU memory; no rows if the recipe uses no GPU."""
    if device_of(recipe) == "cpu":
        return []
    rows = {
        "GPU memory in GB": GIGABYTES,
        "learner alone: micro-batch": [largest_micro_batch(numbers, size) for size in GIGABYTES],
        "sampler alone: images per task": [
            numbers.sizes.largest_batch(usable_bytes(size * 2**30)) for size in GIGABYTES
        ],
    }
    if numbers.ranks == 1:  # several ranks have a GPU each
        pools, samplers = [pool for pool in all_pools(recipe) if pool.table.num_gpus], recipe.samplers.count
        scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
        processes, others = (
            1 + samplers + sum(pool.table.count for pool in pools),
            numbers.sampler_bytes * samplers + scoring,
        )
        rows["all roles on one: micro-batch"] = [
            largest_micro_batch(numbers, size, processes, others) for size in GIGABYTES
        ]
    return [(name, "".join(f"{value or '-':>6}" for value in values).lstrip()) for name, values in rows.items()]


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
    return largest_divisor(numbers.transitions_per_rank, numbers.sizes.learner.largest(free))
