"""The largest micro-batch that the learner's device holds: found by trying on a GPU, by prediction on a CPU."""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from ray_ddpo.common.diffusion.memory.live_bytes import allocated_peak
from ray_ddpo.common.diffusion.memory.meta_device import IntegerIndices, synthetic_conditioning
from ray_ddpo.common.diffusion.memory.sizes import (
    LEFT_FREE,
    PolicySizes,
    largest_divisor,
    parameter_bytes,
    usable_bytes,
)
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.optimization.optimizer import FLOAT_MOMENTS, rank_moment_bytes, with_moments_of
from ray_ddpo.learner.process_group import buffer_bytes

# What the recipes for a CPU have; whether more would be faster there was not measured.
MOST_ON_CPU = 32


def micro_batch_size(policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> int:
    """The recipe's number; where that is "auto", the largest divisor of a rank's pairs of a step that the device holds.

    ValueError: not even one pair fits.
    """
    given, per_image = recipe.learner.micro_batch_size, algorithm.pairs_per_image(recipe, len(policy.stochastic_steps))
    if given != "auto":
        return given
    pairs = recipe.learner.images_per_rank * per_image
    on_gpu = policy.device.startswith("cuda")
    sizes = with_moments_of(recipe.learner, config.sizes(recipe.sampling, "cuda" if on_gpu else "cpu"))
    if on_gpu:
        limit = gpu_limit(recipe.learner.num_gpus)
        beside = recipe.images_per_round * sizes.conditioning_bytes
        beside += buffer_bytes(sizes.trained_parameters, recipe.learner.world_size)
        trial = StepTrial(policy, algorithm, sizes, rank_moment_bytes(recipe.learner, sizes))
        found = largest_that_fits(pairs, limit - beside, sizes.learner.largest(limit - beside), trial.peak)
    else:
        limit = (1 - LEFT_FREE) * psutil.virtual_memory().available
        found = largest_divisor(pairs, min(sizes.learner.largest(limit), MOST_ON_CPU))
    if not found:
        advice = (
            "a smaller policy.resolution" if config.gradient_checkpointing else "policy.gradient_checkpointing = true"
        )
        raise ValueError(
            f'learner.micro_batch_size is "auto", and one pair takes {sizes.learner.of(1) / 1e9:.2f} GB of the '
            f"{limit / 1e9:.2f} GB that may be used: give {advice}, or half precision"
        )
    whose = "an optimizer step's" if recipe.learner.world_size == 1 else "a rank's"
    print(f"learner.micro_batch_size: {found} of {whose} {pairs} pairs, found for {policy.device}", flush=True)
    return found


def gpu_limit(num_gpus: float | int) -> float:
    """Bytes that a learner may allocate with such a share of a GPU: of what is its own, and is free at this moment."""
    free, total = torch.cuda.mem_get_info()
    own = usable_bytes(min(num_gpus, 1.0) * total if num_gpus else total)
    return min(own, (1 - LEFT_FREE) * (free + torch.cuda.memory_reserved()))


def largest_that_fits(pairs: int, limit: float | int, predicted: int, peak: Callable[[int], float]) -> int:
    """The largest divisor of `pairs` whose peak is not above `limit`, looked for from the predicted one; 0: none."""
    sizes = [size for size in range(1, pairs + 1) if pairs % size == 0]
    place = max(0, sum(size <= predicted for size in sizes) - 1)
    if peak(sizes[place]) <= limit:
        while place + 1 < len(sizes) and peak(sizes[place + 1]) <= limit:
            place += 1
        return sizes[place]
    return next((size for size in reversed(sizes[:place]) if peak(size) <= limit), 0)


class StepTrial:
    """Steps on made-up pairs: they take what real ones do, and leave no trace in the policy."""

    def __init__(
        self, policy: Policy, algorithm: Algorithm, sizes: PolicySizes, moment_bytes: int | None = None
    ) -> None:
        """`moment_bytes`: what the optimizer keeps; none: two float32 moments of every trained parameter."""
        self._policy = policy
        self._algorithm = algorithm
        self._sizes = sizes
        self._moment_bytes = FLOAT_MOMENTS * sizes.trained_parameters if moment_bytes is None else moment_bytes

    def peak(self, pairs: int) -> float | int:
        """The most bytes allocated at once in an optimizer step with micro-batches of so many; infinite: out of memory."""
        held = parameter_bytes(self._policy.network)
        peak = allocated_peak(lambda: self._step(pairs), self._policy.device, held)
        self._policy.network.zero_grad(set_to_none=True)
        return peak

    def _step(self, pairs: int) -> None:
        """Two micro-batches, for the second has gradients beside it, as most have; and the optimizer's moments."""
        moments = torch.empty(self._moment_bytes, dtype=torch.uint8, device=self._policy.device)
        for _ in range(2):
            batch = made_up_batch(self._policy, self._algorithm, self._sizes, pairs)
            with IntegerIndices():
                loss = self._algorithm.compute_loss(self._policy, batch).loss
            (loss.sum() / (2 * pairs)).backward()
        del moments


def made_up_batch(
    policy: Policy, algorithm: Algorithm, sizes: PolicySizes, pairs: int
) -> TransitionBatch | NoisedBatch:
    """Return pairs of zeros with all that the algorithm asks for."""

    def latents(wanted: bool = True) -> Tensor | None:
        return torch.zeros(pairs, *policy.latent_shape, device=policy.device) if wanted else None

    def numbers(value: float) -> Tensor:
        return torch.full((pairs,), value, device=policy.device)

    conditioning = synthetic_conditioning(sizes.conditioning_shape, sizes.conditioning_dtypes, pairs, policy.device)
    steps = torch.full((pairs,), policy.stochastic_steps[0], device=policy.device)
    entering, leaving = latents(), latents()
    assert entering is not None and leaving is not None
    if algorithm.noised_samples_per_image is not None:
        old = latents(algorithm.needs_old_predictions)
        pretrained = latents(algorithm.needs_reference_predictions)
        return NoisedBatch(conditioning, steps, entering, leaving, numbers(1.0), old, pretrained)
    return TransitionBatch(
        conditioning,
        steps,
        entering,
        leaving,
        numbers(0.0),
        numbers(1.0),
        numbers(0.0) if algorithm.needs_proximal_log_probs else None,
        latents(algorithm.needs_behavior_means),
        latents(algorithm.needs_reference_means),
    )
