"""ddpo plan: print batch sizes, data volumes and memory of a recipe, before anything runs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ray_ddpo.common.diffusion.memory.sizes import largest_divisor, usable_bytes
from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import SHARED, all_pools
from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.deploy.commands.plan.balance import GIGABYTES as GPU_MEMORY
from ray_ddpo.deploy.commands.plan.balance import balance_rows, balanced, proposal, write_balanced
from ray_ddpo.deploy.commands.plan.evaluation import evaluation_rows
from ray_ddpo.deploy.commands.plan.numbers import Plan, device_of, in_bytes, plan_of_components, shares_gpus
from ray_ddpo.deploy.driver.components import Components, build_components, components_of
from ray_ddpo.deploy.driver.gpu_layout import LITTLE
from ray_ddpo.deploy.driver.numerics_notes import rows_note
from ray_ddpo.deploy.driver.suite_checks import suite_notes
from ray_ddpo.deploy.driver.warmup_note import warmup_note
from ray_ddpo.learner.optimization.checkpointing import LEAST
from ray_ddpo.learner.optimization.optimizer import rank_optimizer_state_bytes, rank_weight_bytes
from ray_ddpo.learner.sharding.layout import shards_weights

GIGABYTES = (8, 12, 16, 24, 40, 80)  # memory of GPUs of usual sizes

Rows = list[tuple[str, str]]  # name and value


# A learner of one rank goes with every batch size.
ONE_RANK = ("--learner.world_size", "1", "--learner.colocated", "false")


def recipe_to_plan(path: str, overrides: Sequence[str], gpus: int | None) -> Recipe:
    """Load a recipe. If GPUs are to be shared among its roles, its own number of ranks need not fit its batches.

    Raises:
        ValueError: the recipe cannot be used, whatever its number of ranks.
    """
    try:
        recipe = Recipe.load(path, list(overrides))
        components_of(recipe)
        return recipe
    except ValueError as error:
        if gpus is None:
            raise
        found = Recipe.load(path, [*overrides, *ONE_RANK])
        print_line(f"note: planned with one learner rank, because the recipe's own layout is refused: {error}")
        return found


def plan(recipe: Recipe, gpus: int | None = None, gigabytes: float = GPU_MEMORY, output: str | None = None) -> str:
    """Return the plan as lines of text.

    Args:
        recipe: the recipe.
        gpus: number of GPUs to share among the roles. None: the recipe's own layout stays.
        gigabytes: memory of each of these GPUs.
        output: file to write the recipe with the best layout to.

    Raises:
        ValueError: the recipe or its model cannot be used, no layout fits, or the file exists.
    """
    if gpus is None and output is not None:
        raise ValueError(
            f"--output is {output} and --gpus is missing: give the number of GPUs to share among the roles"
        )
    components = build_components(recipe)
    with sizes_cache():
        numbers = plan_of_components(components)
    text = _table(recipe, components, numbers)
    if gpus is None:
        return text
    text += f"\n\n{proposal(components, numbers, gpus, gigabytes)}"
    if output is None:
        return text
    chosen = balanced(components, numbers, gpus, gigabytes)
    return f"{text}\n{write_balanced(Path(output), recipe, chosen, gpus, gigabytes)}"


def _table(recipe: Recipe, components: Components, numbers: Plan) -> str:
    """Return all numbers of a recipe, a line each."""
    rows = [*_batch_rows(recipe, numbers), *_byte_rows(recipe, numbers), *_gpu_rows(recipe)]
    rows += balance_rows(components, numbers)
    rows += evaluation_rows(components, numbers)
    notes = (rows_note(components), warmup_note(components), *suite_notes(recipe, components.prompts))
    rows += [("note", note) for note in notes if note]
    rows += _fitting_rows(recipe, numbers)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _batch_rows(recipe: Recipe, numbers: Plan) -> Rows:
    """Return the numbers of images, steps and passes."""
    sampling, learner, ranks = recipe.sampling, recipe.learner, numbers.ranks
    chosen, each = numbers.images_learned_from, numbers.transitions_per_step // numbers.images_per_step
    learned_from = f"{chosen}" if chosen == numbers.images else f"about {chosen} selected"
    if learner.replay_rounds:
        learned_from = f"{learned_from.removesuffix(' selected')} with those of {learner.replay_rounds} earlier rounds"
    transitions = f"{each} noised samples" if numbers.forward_process else f"{each} of {sampling.num_steps} steps"
    if sampling.backprop_steps is not None:
        least, most = sampling.backprop_range
        steps = f"{least}" if least == most else f"{least} to {most}"
        transitions = f"{each} restart{'s' * (each > 1)} through the last {steps} of {sampling.num_steps} steps"
    size = learner.micro_batch_size
    rows = [
        ("images per round", f"{numbers.images} = {numbers.tasks} tasks × {sampling.batch_size}"),
        *_refill_rows(numbers),
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
        rows += [("each learner rank", shares)]
        rows += _sharding_rows(learner, numbers) or [("gradient all-reduce", summed)]
    return [*rows, ("learner forward passes per round", f"{numbers.forward_passes}")]


def _refill_rows(numbers: Plan) -> Rows:
    """Return how many images a round may have if it is refilled; no rows if it is not."""
    attempts = numbers.refill_attempts
    if not attempts:
        return []
    most = f"up to {numbers.images * (1 + attempts)} images in {attempts} refill{'s' * (attempts > 1)}"
    return [("refilled rounds", f"{most}; times and images in total are those without")]


def _sharding_rows(learner: LearnerTable, numbers: Plan) -> Rows:
    """Return what a rank holds and gathers if weights are sharded; no rows if they are not."""
    sizes = numbers.sizes
    if not shards_weights(learner):
        return []
    if not sizes.units.weights:
        return [("sharded weights", "not counted: the policy's `sizes` tells no bytes of its network's blocks")]
    held, state = rank_weight_bytes(learner, sizes), rank_optimizer_state_bytes(learner, sizes)
    where = ", in the host's memory" if learner.offload_weights else ""
    shard = f"{in_bytes(held + state)} per rank{where}: {in_bytes(held)} of weights and gradients, the rest AdamW's"
    gathered = f"{in_bytes(sizes.units.gathered)} at most, of blocks of up to {in_bytes(sizes.units.largest)}"
    sent = f"{in_bytes(sizes.units.weights)} in the forward and again in the backward pass of each micro-batch"
    return [("sharded weights", shard), ("gathered at a time", gathered), ("gathered in all", sent)]


def _byte_rows(recipe: Recipe, numbers: Plan) -> Rows:
    """Return the bytes that the roles exchange and keep."""
    learner, sizes, one_rank, pools = recipe.learner, numbers.sizes, numbers.ranks == 1, all_pools(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    total = numbers.learner_bytes * numbers.ranks + numbers.sampler_bytes * recipe.samplers.count + scoring
    if shares_gpus(recipe):
        total = numbers.pair_bytes * numbers.ranks + scoring
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
    if numbers.gradient_bytes:
        what = "decoder and rewards, for the rewards' gradients; the rewards' activations are not counted"
        rows.append(
            ("of it" if one_rank else "of each", f"{in_bytes(numbers.gradient_bytes)} for the weights of {what}")
        )
    if numbers.value_bytes:
        where = "of it" if one_rank else "of each"
        rows.append((where, f"{in_bytes(numbers.value_bytes)} for the value function, its optimizer and a batch"))
    if numbers.plain_learner:
        more = numbers.plain_learner.of(numbers.micro_batch) - sizes.learner.of(numbers.micro_batch)
        rows.append(("gradient checkpointing", f"only where it must be; without it {in_bytes(more)} more"))
    if numbers.copy_bytes:  # samplers and learner compute differently
        whose = "of it, in the host's memory" if one_rank else "of each rank, in its host's memory"
        why = "for a second copy of the network, which computes as samplers do and checks their log-probs"
        rows.append((whose, f"{in_bytes(numbers.copy_bytes)} {why}"))
    rows.append(
        ("sampler memory", f"{in_bytes(numbers.sampler_bytes)} at most, with tasks of {recipe.sampling.batch_size}")
    )
    if shares_gpus(recipe):
        why = f"the weights of both, and the activations of one at a time ({in_bytes(numbers.learner_bytes)} + "
        why += f"{in_bytes(numbers.sampler_bytes)} apart)"
        rows.append(("rank and sampler on one GPU", f"{in_bytes(numbers.pair_bytes)} at most: {why}"))
    if numbers.graph_bytes:
        rows.append(("CUDA graphs", f"{in_bytes(numbers.graph_bytes)} more in a sampler, where memory allows"))
    for pool in pools:
        own = "" if pool.name == SHARED else f" ({', '.join(pool.rewards)})"
        name = f"{'reward worker' if pool.trains else 'scorer'} memory{own}"
        rows.append((name, in_bytes(numbers.reward_worker_bytes[pool.name])))
    return [*rows, ("total memory", f"{in_bytes(total)}: {', '.join(f'{n} {role}' for role, n, _ in _actors(recipe))}")]


def _gpu_rows(recipe: Recipe) -> Rows:
    """Return the GPUs that the recipe asks for, and those of this machine if they are fewer."""
    actors, here = _actors(recipe), torch.cuda.device_count()
    asked = sum(gpus for *_, gpus in actors)
    pairs = recipe.learner.world_size if shares_gpus(recipe) else 0
    few = f"{here}, fewer than the recipe asks for: lower samplers.count or num_gpus, or set RAY_ADDRESS to a cluster"
    parts = " + ".join(f"{role} {gpus:g}" for role, _, gpus in actors)
    own = f", on {pairs} or more, one for each rank and its sampler" if pairs else ""
    rows = [("requested GPUs", f"{asked:g} = {parts}{own}")]
    return [*rows, *([("GPUs here", few)] if 0 < here < max(asked - LITTLE, pairs) else [])]


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
    rows: dict[str, Sequence[int | str]] = {
        "GPU memory in GB": GIGABYTES,
        "learner alone: micro-batch": [largest_micro_batch(numbers, size) for size in GIGABYTES],
        "sampler alone: images per task": [
            numbers.sizes.largest_batch(usable_bytes(size * 2**30)) for size in GIGABYTES
        ],
    }
    if numbers.plain_learner:
        rows["… re-computes activations"] = [
            ("yes" if recomputes(recipe, numbers, size) else "no") if largest_micro_batch(numbers, size) else 0
            for size in GIGABYTES
        ]
    if shares_gpus(recipe):
        rows["rank and sampler on one: micro-batch"] = [largest_shared_micro_batch(numbers, size) for size in GIGABYTES]
    elif numbers.ranks == 1:  # several ranks have a GPU each
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
    free = _free_bytes(numbers, gigabytes, processes, others)
    found = largest_divisor(numbers.transitions_per_rank, numbers.sizes.learner.largest(free))
    if numbers.plain_learner is None:
        return found
    plain = largest_divisor(numbers.transitions_per_rank, numbers.plain_learner.largest(free))
    return plain if plain >= min(LEAST, numbers.transitions_per_rank) else found


def recomputes(recipe: Recipe, numbers: Plan, gigabytes: int) -> bool:
    """Return whether a learner alone on a GPU re-computes activations if gradient checkpointing is "auto"."""
    assert numbers.plain_learner is not None, "the recipe decides itself"
    given, free = recipe.learner.micro_batch_size, _free_bytes(numbers, gigabytes)
    if given != "auto":
        return numbers.plain_learner.of(given) > free
    plain = largest_divisor(numbers.transitions_per_rank, numbers.plain_learner.largest(free))
    return plain < min(LEAST, numbers.transitions_per_rank)


def _free_bytes(numbers: Plan, gigabytes: int, processes: int = 1, others: int = 0) -> float:
    """Return the bytes of a GPU that a learner's steps may take beside other processes and a round's prompts."""
    kept = numbers.conditioning_bytes + numbers.reduced_bytes + numbers.value_bytes
    return usable_bytes(gigabytes * 2**30, processes) - others - kept


def largest_shared_micro_batch(numbers: Plan, gigabytes: int) -> int:
    """Return the largest micro-batch that fits on a GPU that a learner rank and a sampler share in turns.

    Returns:
        The micro-batch size, or 0 if not even one transition fits, or not a task of the sampler's.
    """
    if numbers.sizes.learner.fixed + numbers.sampler_bytes > usable_bytes(gigabytes * 2**30, processes=2):
        return 0
    return largest_micro_batch(numbers, gigabytes, processes=2, others=numbers.sampler_resting_bytes)
