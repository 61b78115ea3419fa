"""Batch sizes, data volumes and predicted memory of a recipe, computed before anything runs."""

import math
from dataclasses import dataclass

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.execution import records_graphs
from ray_ddpo.common.diffusion.memory.live_bytes import PeakBytes
from ray_ddpo.common.diffusion.memory.sizes import PolicySizes
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.policy_versions import num_kept
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools
from ray_ddpo.common.trajectory import DTYPES
from ray_ddpo.common.user_code.blame import call_if_own
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.deploy.driver.gpu_layout import device_of
from ray_ddpo.learner.optimization.optimizer import optimizer_state_bytes, rank_sizes
from ray_ddpo.learner.process_group import buffer_bytes
from ray_ddpo.learner.value_function import value_bytes
from ray_ddpo.learner.weight_check import computes_as_samplers


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of one round, and peak bytes of tensors. The libraries' own memory is not included."""

    images: int
    images_learned_from: int  # an estimate if the algorithm selects images
    tasks: int
    optimizer_steps: int  # per round
    images_per_step: int
    transitions_per_step: int  # transitions, or noised samples of finished images, per optimizer step
    micro_batch: int  # transitions per forward pass; 1 if the size is found at the start
    forward_passes: int  # of all learner ranks together, per round
    trajectory_bytes: int  # of one image, as it is transferred
    round_bytes: int  # of all trajectories in flight, if a round is refilled as often as it may be
    broadcast_bytes: int  # of one policy version
    optimizer_bytes: int  # of the optimizer state in a checkpoint
    conditioning_bytes: int  # of a round's prompts, on the learner's device
    learner_bytes: int  # of one rank
    sampler_bytes: int
    graph_bytes: int  # that a sampler's CUDA graphs keep while it decodes, if memory allows
    reward_worker_bytes: dict[str, int]  # of one worker, by pool
    sizes: PolicySizes
    forward_process: bool  # the algorithm adds noise to finished images
    ranks: int
    reduced_bytes: int  # of a rank's buffer for the all-reduce of gradients
    copy_bytes: int  # of a rank's second copy of the network, on the host, which checks samplers' log-probs
    # The learner's peak by transitions without gradient checkpointing, if that is "auto"; `sizes` has the peak with it.
    plain_learner: PeakBytes | None = None
    refill_attempts: int = 0  # further samplings of a round, at most
    value_bytes: int = 0  # of the algorithm's value function on a learner rank
    gradient_bytes: int = 0  # of decoder and rewards on a learner rank, if it propagates the rewards' gradients

    @property
    def transitions_per_rank(self) -> int:
        """Return a rank's transitions per optimizer step."""
        return self.transitions_per_step // self.ranks

    @property
    def pair_bytes(self) -> int:
        """Return the peak of a learner rank and a sampler that take turns on one GPU.

        It is what both keep while they sleep, and the larger of what they need besides.
        """
        rank, sampler = round(self.sizes.learner.fixed), self.sampler_resting_bytes
        return rank + sampler + max(self.learner_bytes - rank, self.sampler_bytes - sampler)

    @property
    def sampler_resting_bytes(self) -> int:
        """Return what a sampler keeps between its turns: its weights."""
        return round(self.sizes.sampling.fixed)


def plan_of(recipe: Recipe) -> Plan:
    """Return the plan of a recipe.

    Raises:
        ValueError: The recipe or its model cannot be used.
    """
    return plan_of_components(build_components(recipe))


def plan_of_components(components: Components) -> Plan:
    """Return the plan of a recipe's components, even if the files that they need are missing."""
    recipe, policy = components.recipe, components.policy
    sampling, learner = recipe.sampling, recipe.learner
    is_auto = policy.gradient_checkpointing == "auto"
    sizes = _sizes(policy.with_checkpointing(True) if is_auto else policy, components)
    trajectory = _trajectory_bytes(recipe, sizes)
    transitions = learner.images_per_step * components.algorithm.transitions_per_image(recipe, sizes.stochastic_steps)
    learned_from = round(components.algorithm.images_learned_from(recipe))
    steps = components.algorithm.steps_per_round(recipe)
    micro_batch = 1 if learner.micro_batch_size == "auto" else learner.micro_batch_size
    conditioning = recipe.images_per_round * sizes.conditioning_bytes
    reduced = buffer_bytes(sizes.trained_parameters, learner.world_size)
    copy = 0 if computes_as_samplers(policy, recipe) else sizes.network_bytes
    value = _value_bytes(components, sizes)
    rounds_in_flight = num_kept(recipe.kept_lag) + components.algorithm.refill_attempts  # one is refilled at a time
    has_graphs = records_graphs(policy, device_of(recipe)) and not policy.is_compiled("sampler")
    return Plan(
        images=recipe.images_per_round,
        images_learned_from=learned_from,
        tasks=sampling.batches_per_round,
        optimizer_steps=steps,
        images_per_step=learner.images_per_step,
        transitions_per_step=transitions,
        micro_batch=micro_batch,
        forward_passes=steps * transitions // micro_batch,
        trajectory_bytes=trajectory,
        round_bytes=trajectory * recipe.images_per_round * rounds_in_flight,
        broadcast_bytes=4 * sizes.trained_parameters,
        optimizer_bytes=optimizer_state_bytes(learner, sizes),
        conditioning_bytes=conditioning,
        learner_bytes=learner_peak(recipe, sizes, micro_batch, copy) + conditioning + reduced + value,
        sampler_bytes=sizes.sampler_bytes(sampling.batch_size),
        graph_bytes=round(sampling.batch_size * sizes.sampling.each) if has_graphs else 0,
        reward_worker_bytes={
            pool.name: sum(reward.memory_bytes for reward in components.rewards_of(pool).values())
            for pool in all_pools(recipe)
        },
        sizes=sizes,
        forward_process=components.algorithm.noised_samples_per_image is not None,
        ranks=learner.world_size,
        reduced_bytes=reduced,
        copy_bytes=copy,
        gradient_bytes=_gradient_bytes(components, sizes),
        value_bytes=value,
        refill_attempts=components.algorithm.refill_attempts,
        plain_learner=_sizes(policy.with_checkpointing(False), components).learner if is_auto else None,
    )


def _trajectory_bytes(recipe: Recipe, sizes: PolicySizes) -> int:
    """Return the bytes of one image's trajectory, as it is transferred."""
    sampling = recipe.sampling
    latent_bytes = math.prod(sizes.latent_shape) * DTYPES[sampling.latents_dtype].itemsize
    kept = sampling.trained_steps(sizes.stochastic_steps)
    # Consecutive steps share the latents between them. Steps sampled singly are transferred with both latents.
    latents = kept + 2 if sampling.timestep_fraction == 1 else 2 * kept + 1
    start = 0 if sampling.backprop_steps is None else latent_bytes + 8  # where the learner begins again
    return latents * latent_bytes + kept * 12 + sizes.conditioning_bytes + start


def _gradient_bytes(components: Components, sizes: PolicySizes) -> int:
    """Return the weights of decoder and rewards that a rank holds for the rewards' gradients; 0 if it does not."""
    if components.algorithm.restarts_per_image is None:
        return 0
    tables = [table for table in components.recipe.all_rewards if table.weight]
    return sizes.decoder_bytes + sum(components.rewards[table.called].memory_bytes for table in tables)


def _value_bytes(components: Components, sizes: PolicySizes) -> int:
    """Return the bytes of the algorithm's value function on a learner rank; 0 if it has none."""
    settings = components.algorithm.value_settings
    if settings is None:
        return 0
    return value_bytes(settings, math.prod(sizes.latent_shape), components.recipe.sampling.num_steps)


def _sizes(policy: PolicyConfig, components: Components) -> PolicySizes:
    recipe = components.recipe
    sizes = call_if_own(policy, POLICIES, "sizes", recipe.sampling, device_of(recipe))
    return rank_sizes(recipe.learner, components.algorithm.learner_sizes(sizes))


def learner_peak(recipe: Recipe, sizes: PolicySizes, micro_batch: int, copy: int) -> int:
    """Return the peak bytes of a rank's tensors on its device, while it learns or while it checks a round.

    Args:
        recipe: the recipe.
        sizes: sizes of its policy.
        micro_batch: transitions per forward pass.
        copy: bytes of the network's second copy, which is in the host's memory except during checks. 0: no copy.
    """
    learning = sizes.learner.of(micro_batch)
    if not copy:
        return learning
    checking = round(sizes.learner.fixed + copy + recipe.sampling.batch_size * sizes.sampling.each)
    return max(learning + (copy if device_of(recipe) == "cpu" else 0), checking)


def shares_gpus(recipe: Recipe) -> bool:
    """Return whether each learner rank shares a GPU with a sampler, in turns."""
    return recipe.learner.colocated and recipe.learner.num_gpus > 0


def in_bytes(count: int) -> str:
    """Return a number of bytes with a suitable unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
