"""ddpo plan: the sizes that follow from a recipe, before anything runs."""

from dataclasses import dataclass

from common.config import Recipe
from common.diffusion.sizes import PolicySizes
from common.reward_pools import SHARED, RewardPool, all_pools
from common.trajectory import DTYPES
from deploy.parts import Parts, parts_of


@dataclass(frozen=True)
class Plan:
    """Numbers of one round, and bytes. Everything is counted but temporary buffers and the libraries' own memory."""

    images: int
    images_learned_from: int  # about so many, where the algorithm leaves the others out
    tasks: int
    optimizer_steps: int  # a round
    images_per_step: int
    pairs_per_step: int  # transitions, or noisings of finished images
    forward_passes: int  # of the learner, a round
    trajectory_bytes: int  # one image's, as it travels
    round_bytes: int  # all trajectories under way at once
    broadcast_bytes: int  # one policy version
    learner_bytes: int
    sampler_bytes: int
    reward_worker_bytes: dict[str, int]  # by pool, of one worker
    sizes: PolicySizes
    forward_process: bool  # learned from are finished images, noised anew


def plan_of(recipe: Recipe) -> Plan:
    """All numbers of a recipe. ValueError: the recipe or its model cannot be used."""
    return plan_of_parts(parts_of(recipe))


def plan_of_parts(parts: Parts) -> Plan:
    """The same of a recipe's parts, whether or not all that they need is there."""
    recipe, policy = parts.recipe, parts.policy
    sizes = policy.sizes(recipe.sampling)
    sampling, learner = recipe.sampling, recipe.learner
    channels, height, width = sizes.latent_shape
    latent_bytes = channels * height * width * DTYPES[sampling.latents_dtype].itemsize
    kept = sampling.kept_steps(sampling.num_steps)
    # Neighbouring steps share what leaves one and enters the next; steps drawn by themselves travel with both.
    latents = kept + 2 if sampling.step_fraction == 1 else 2 * kept + 1
    trajectory = latents * latent_bytes + kept * 12 + sizes.conditioning_bytes
    weight_bytes = DTYPES[policy.dtype].itemsize
    network = sizes.network_parameters * (weight_bytes if policy.train == "lora" else 4)
    adapters = sizes.trained_parameters * 4 if policy.train == "lora" else 0
    pairs = learner.images_per_step * parts.algorithm.pairs_per_image(recipe, sampling.num_steps)
    learned_from = round(recipe.images_per_round * parts.algorithm.share_that_teaches)
    steps = -(-learned_from // learner.images_per_step) * learner.inner_epochs
    # Gradient and AdamW's two moments, in float32, of each trained parameter.
    training = 3 * 4 * sizes.trained_parameters + learner.micro_batch_size * sizes.activation_bytes
    return Plan(
        images=recipe.images_per_round,
        images_learned_from=learned_from,
        tasks=sampling.batches_per_round,
        optimizer_steps=steps,
        images_per_step=learner.images_per_step,
        pairs_per_step=pairs,
        forward_passes=steps * pairs // learner.micro_batch_size,
        trajectory_bytes=trajectory,
        round_bytes=trajectory * recipe.images_per_round * (recipe.max_policy_lag + 1),
        broadcast_bytes=4 * sizes.trained_parameters,
        learner_bytes=network + adapters + training,
        sampler_bytes=network + adapters + sizes.sampler_parameters * weight_bytes,
        reward_worker_bytes={
            pool.name: sum(reward.memory_bytes for reward in parts.rewards_of(pool).values())
            for pool in all_pools(recipe)
        },
        sizes=sizes,
        forward_process=parts.algorithm.noisings_per_image is not None,
    )


def plan(recipe: Recipe) -> str:
    """The plan in words."""
    numbers = plan_of(recipe)
    sampling, learner = recipe.sampling, recipe.learner
    pools = all_pools(recipe)
    scoring = sum(numbers.reward_worker_bytes[pool.name] * pool.table.count for pool in pools)
    memory = numbers.learner_bytes + numbers.sampler_bytes * recipe.samplers.count + scoring
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
            f"in micro-batches of {learner.micro_batch_size}",
        ),
        ("learner's forward passes a round", f"{numbers.forward_passes}"),
        ("parameters trained", f"{numbers.sizes.trained_parameters:,} of {numbers.sizes.network_parameters:,}"),
        ("a trajectory", f"{in_bytes(numbers.trajectory_bytes)} an image, {in_bytes(numbers.round_bytes)} under way"),
        ("a broadcast", f"{in_bytes(numbers.broadcast_bytes)} to each sampler's node, once a round"),
        (
            "learner's memory",
            f"{in_bytes(numbers.learner_bytes)}, of it activations {in_bytes(_activations(recipe, numbers))}",
        ),
        ("a sampler's memory", f"{in_bytes(numbers.sampler_bytes)} and its working buffers"),
        *((f"{_who(pool)} memory{_own(pool)}", in_bytes(numbers.reward_worker_bytes[pool.name])) for pool in pools),
        ("memory in all", f"{in_bytes(memory)}: {', '.join(f'{count} {role}' for role, count, _ in _actors(recipe))}"),
        ("GPUs asked for", _gpus(recipe)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _learned_from(numbers: Plan) -> str:
    chosen = numbers.images_learned_from
    return f"{chosen}" if chosen == numbers.images else f"about {chosen} that count"


def _of_an_image(recipe: Recipe, numbers: Plan) -> str:
    each = numbers.pairs_per_step // numbers.images_per_step
    return f"{each} noisings" if numbers.forward_process else f"{each} of {recipe.sampling.num_steps} steps"


def _who(pool: RewardPool) -> str:
    return "a reward worker's" if pool.trains else "a scorer's"


def _own(pool: RewardPool) -> str:
    return "" if pool.name == SHARED else f" ({', '.join(pool.rewards)})"


def _activations(recipe: Recipe, numbers: Plan) -> int:
    return recipe.learner.micro_batch_size * numbers.sizes.activation_bytes


def _actors(recipe: Recipe) -> list[tuple[str, int, float]]:
    """Of each role its name, how many there are, and the GPUs that they ask for together."""
    workers = [pool.table for pool in all_pools(recipe) if pool.trains]
    scorers = [pool.table for pool in all_pools(recipe) if not pool.trains]
    roles = [("samplers", [recipe.samplers]), ("reward workers", workers), *([("scorers", scorers)] if scorers else [])]
    counted = [
        (role, sum(table.count for table in tables), sum(table.count * table.num_gpus for table in tables))
        for role, tables in roles
    ]
    return [("learner", 1, recipe.learner.num_gpus), *counted]


def _gpus(recipe: Recipe) -> str:
    actors = _actors(recipe)
    return f"{sum(gpus for *_, gpus in actors):g} = {' + '.join(f'{role} {gpus:g}' for role, _, gpus in actors)}"


def in_bytes(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.2f} MB"
        if count >= 1e6
        else f"{count / 1e3:.1f} kB"
    )
