"""ddpo plan: print batch sizes, data volumes and memory of a recipe, before anything runs."""

import torch

from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import SHARED, RewardPool, all_pools
from ray_ddpo.deploy.commands.plan.memory import gpu_rows
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes, plan_of
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.numerics_rows import rows_note
from ray_ddpo.learner.optimization.optimizer import rank_optimizer_state_bytes

LITTLE = 1e-9  # rounding error of a sum of fractions


def plan(recipe: Recipe) -> str:
    """Return the plan as lines of text."""
    with sizes_cache():
        numbers = plan_of(recipe)
    sampling, learner = recipe.sampling, recipe.learner
    pools = all_pools(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    memory = numbers.learner_bytes * numbers.ranks + numbers.sampler_bytes * recipe.samplers.count + scoring
    rows = [
        ("images per round", f"{numbers.images} = {numbers.tasks} tasks × {sampling.batch_size}"),
        ("images in total", f"{numbers.images * recipe.rounds} in {recipe.rounds} rounds"),
        (
            "optimizer steps per round",
            f"{numbers.optimizer_steps} = {_learned_from(numbers)} / ({learner.batch_size} × "
            f"{learner.gradient_accumulation_steps} accumulated) × {learner.inner_epochs} inner epochs",
        ),
        (
            "transitions per optimizer step",
            f"{numbers.pairs_per_step} = {numbers.images_per_step} images × {_of_an_image(recipe, numbers)}, "
            f"in micro-batches {_micro_batches(recipe)}",
        ),
        *_of_ranks(numbers),
        ("learner forward passes per round", f"{numbers.forward_passes}"),
        ("trained parameters", f"{numbers.sizes.trained_parameters:,} of {numbers.sizes.network_parameters:,}"),
        ("trajectory", f"{in_bytes(numbers.trajectory_bytes)} per image, {in_bytes(numbers.round_bytes)} in flight"),
        ("weight broadcast", f"{in_bytes(numbers.broadcast_bytes)} to each sampler's node, once per round"),
        ("optimizer state", f"{in_bytes(numbers.optimizer_bytes)} of {learner.optimizer}{_divided(recipe, numbers)}"),
        ("learner memory" if numbers.ranks == 1 else "learner rank memory", _learners(recipe, numbers)),
        *_of_second_copy(numbers),
        ("sampler memory", f"{in_bytes(numbers.sampler_bytes)} at most, with tasks of {sampling.batch_size}"),
        *((f"{_who(pool)} memory{_own(pool)}", in_bytes(numbers.reward_worker_bytes[pool.name])) for pool in pools),
        ("total memory", f"{in_bytes(memory)}: {', '.join(f'{count} {role}' for role, count, _ in _actors(recipe))}"),
        ("requested GPUs", _gpus(recipe)),
        *_notes(recipe),
        *gpu_rows(recipe, numbers),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _notes(recipe: Recipe) -> list[tuple[str, str]]:
    """Return notes on what this machine lacks, and on log-probs that may differ in rounding."""
    asked, here = sum(gpus for *_, gpus in _actors(recipe)), torch.cuda.device_count()
    few = f"{here}, fewer than the recipe asks for: lower samplers.count or num_gpus, or set RAY_ADDRESS to a cluster"
    rows = rows_note(components_of(recipe))
    return [*([("GPUs here", few)] if 0 < here < asked - LITTLE else []), *([("note", rows)] if rows else [])]


def _learned_from(numbers: Plan) -> str:
    chosen = numbers.images_learned_from
    return f"{chosen}" if chosen == numbers.images else f"about {chosen} selected"


def _of_an_image(recipe: Recipe, numbers: Plan) -> str:
    each = numbers.pairs_per_step // numbers.images_per_step
    return f"{each} noised samples" if numbers.forward_process else f"{each} of {recipe.sampling.num_steps} steps"


def _of_ranks(numbers: Plan) -> list[tuple[str, str]]:
    """Return how the learner's ranks share an optimizer step; no rows if there is one rank."""
    if numbers.ranks == 1:
        return []
    images, summed = numbers.images_per_step // numbers.ranks, in_bytes(numbers.broadcast_bytes)
    shares = f"{images} of {numbers.images_per_step} images, {numbers.pairs_per_rank} of {numbers.pairs_per_step} transitions"
    return [
        ("each learner rank", f"{shares} per optimizer step"),
        ("gradient all-reduce", f"{summed} per optimizer step, among {numbers.ranks} ranks"),
    ]


def _divided(recipe: Recipe, numbers: Plan) -> str:
    part = rank_optimizer_state_bytes(recipe.learner, numbers.sizes)
    return f", {in_bytes(part)} per rank" if part < numbers.optimizer_bytes else ""


def _who(pool: RewardPool) -> str:
    return "reward worker" if pool.trains else "scorer"


def _own(pool: RewardPool) -> str:
    return "" if pool.name == SHARED else f" ({', '.join(pool.rewards)})"


def _micro_batches(recipe: Recipe) -> str:
    size = recipe.learner.micro_batch_size
    return "found at the start" if size == "auto" else f"of {size}"


def _learners(recipe: Recipe, numbers: Plan) -> str:
    found = (
        f"{in_bytes(numbers.learner_bytes)} at most, {in_bytes(round(numbers.sizes.learner.each))} of it per transition"
    )
    return f"{found}; so with micro-batches of 1" if recipe.learner.micro_batch_size == "auto" else found


def _of_second_copy(numbers: Plan) -> list[tuple[str, str]]:
    """Return the memory of the log-prob check if samplers and learner compute differently."""
    if not numbers.copy_bytes:
        return []
    whose = "of it, in the host's memory" if numbers.ranks == 1 else "of each rank, in its host's memory"
    why = "for a second copy of the network, which computes as samplers do and checks their log-probs"
    return [(whose, f"{in_bytes(numbers.copy_bytes)} {why}")]


def _actors(recipe: Recipe) -> list[tuple[str, int, float]]:
    """Return for each role its name, the number of actors, and the GPUs of all of them."""
    workers = [pool.table for pool in all_pools(recipe) if pool.trains]
    scorers = [pool.table for pool in all_pools(recipe) if not pool.trains]
    roles = [("samplers", [recipe.samplers]), ("reward workers", workers), *([("scorers", scorers)] if scorers else [])]
    counted = [
        (role, sum(table.count for table in tables), sum(table.count * table.num_gpus for table in tables))
        for role, tables in roles
    ]
    ranks = recipe.learner.world_size
    return [("learner" if ranks == 1 else "learner ranks", ranks, ranks * recipe.learner.num_gpus), *counted]


def _gpus(recipe: Recipe) -> str:
    actors = _actors(recipe)
    return f"{sum(gpus for *_, gpus in actors):g} = {' + '.join(f'{role} {gpus:g}' for role, _, gpus in actors)}"
