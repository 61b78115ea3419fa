"""ddpo plan: the sizes that follow from a recipe, before anything runs."""

import torch

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import SHARED, RewardPool, all_pools
from ray_ddpo.deploy.commands.plan.memory import gpu_rows
from ray_ddpo.deploy.commands.plan.numbers import Plan, in_bytes, plan_of
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.numerics_rows import rows_note
from ray_ddpo.learner.optimization.optimizer import rank_optimizer_state_bytes

LITTLE = 1e-9  # by which a sum of fractions may be wrong


def plan(recipe: Recipe) -> str:
    """The plan in words."""
    numbers = plan_of(recipe)
    sampling, learner = recipe.sampling, recipe.learner
    pools = all_pools(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    memory = numbers.learner_bytes * numbers.ranks + numbers.sampler_bytes * recipe.samplers.count + scoring
    rows = [
        ("images a round", f"{numbers.images} = {numbers.tasks} tasks × {sampling.batch_size}"),
        ("images in all", f"{numbers.images * recipe.rounds} in {recipe.rounds} rounds"),
        (
            "optimizer steps a round",
            f"{numbers.optimizer_steps} = {_learned_from(numbers)} / ({learner.batch_size} × "
            f"{learner.gradient_accumulation_steps} accumulated) × {learner.inner_epochs} inner epochs",
        ),
        (
            "pairs an optimizer step",
            f"{numbers.pairs_per_step} = {numbers.images_per_step} images × {_of_an_image(recipe, numbers)}, "
            f"in micro-batches {_micro_batches(recipe)}",
        ),
        *_of_ranks(numbers),
        ("learner's forward passes a round", f"{numbers.forward_passes}"),
        ("parameters trained", f"{numbers.sizes.trained_parameters:,} of {numbers.sizes.network_parameters:,}"),
        ("a trajectory", f"{in_bytes(numbers.trajectory_bytes)} an image, {in_bytes(numbers.round_bytes)} under way"),
        ("a broadcast", f"{in_bytes(numbers.broadcast_bytes)} to each sampler's node, once a round"),
        ("optimizer's state", f"{in_bytes(numbers.optimizer_bytes)} of {learner.optimizer}{_divided(recipe, numbers)}"),
        ("learner's memory" if numbers.ranks == 1 else "a learner rank's memory", _learners(recipe, numbers)),
        *_of_second_copy(numbers),
        ("a sampler's memory", f"{in_bytes(numbers.sampler_bytes)} at the most, with tasks of {sampling.batch_size}"),
        *((f"{_who(pool)} memory{_own(pool)}", in_bytes(numbers.reward_worker_bytes[pool.name])) for pool in pools),
        ("memory in all", f"{in_bytes(memory)}: {', '.join(f'{count} {role}' for role, count, _ in _actors(recipe))}"),
        ("GPUs asked for", _gpus(recipe)),
        *_notes(recipe),
        *gpu_rows(recipe, numbers),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _notes(recipe: Recipe) -> list[tuple[str, str]]:
    """What will not work as it is on this machine, or not as exactly as one might think."""
    asked, here = sum(gpus for *_, gpus in _actors(recipe)), torch.cuda.device_count()
    few = f"{here}, fewer than the recipe asks for: lower samplers.count or num_gpus, or set RAY_ADDRESS to a cluster"
    rows = rows_note(components_of(recipe))
    return [*([("GPUs here", few)] if 0 < here < asked - LITTLE else []), *([("note", rows)] if rows else [])]


def _learned_from(numbers: Plan) -> str:
    chosen = numbers.images_learned_from
    return f"{chosen}" if chosen == numbers.images else f"about {chosen} that count"


def _of_an_image(recipe: Recipe, numbers: Plan) -> str:
    each = numbers.pairs_per_step // numbers.images_per_step
    return f"{each} noised_samples" if numbers.forward_process else f"{each} of {recipe.sampling.num_steps} steps"


def _of_ranks(numbers: Plan) -> list[tuple[str, str]]:
    """How the learner's ranks divide an optimizer step; nothing to say of one."""
    if numbers.ranks == 1:
        return []
    images, summed = numbers.images_per_step // numbers.ranks, in_bytes(numbers.broadcast_bytes)
    shares = f"{images} of {numbers.images_per_step} images, {numbers.pairs_per_rank} of {numbers.pairs_per_step} pairs"
    return [
        ("each of the learner's ranks takes", f"{shares} an optimizer step"),
        ("ranks sum up", f"{summed} of gradients an optimizer step, among {numbers.ranks}"),
    ]


def _divided(recipe: Recipe, numbers: Plan) -> str:
    part = rank_optimizer_state_bytes(recipe.learner, numbers.sizes)
    return f", {in_bytes(part)} a rank" if part < numbers.optimizer_bytes else ""


def _who(pool: RewardPool) -> str:
    return "a reward worker's" if pool.trains else "a scorer's"


def _own(pool: RewardPool) -> str:
    return "" if pool.name == SHARED else f" ({', '.join(pool.rewards)})"


def _micro_batches(recipe: Recipe) -> str:
    size = recipe.learner.micro_batch_size
    return "found at the start" if size == "auto" else f"of {size}"


def _learners(recipe: Recipe, numbers: Plan) -> str:
    found = f"{in_bytes(numbers.learner_bytes)} at the most, of it {in_bytes(round(numbers.sizes.learner.each))} a pair"
    return f"{found}; so with micro-batches of 1" if recipe.learner.micro_batch_size == "auto" else found


def _of_second_copy(numbers: Plan) -> list[tuple[str, str]]:
    """Where samplers and learner compute differently, what the check of a round's log-probs takes."""
    if not numbers.copy_bytes:
        return []
    whose = "of it, in the host's memory" if numbers.ranks == 1 else "of each rank, in its host's memory"
    why = "for a second copy of the network, which computes as samplers do and checks their log-probs"
    return [(whose, f"{in_bytes(numbers.copy_bytes)} {why}")]


def _actors(recipe: Recipe) -> list[tuple[str, int, float]]:
    """Of each role its name, how many there are, and the GPUs that they ask for together."""
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
