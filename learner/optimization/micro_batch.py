"""Find the largest micro-batch that fits the learner's device: by trial on a GPU, by prediction on a CPU."""

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
from ray_ddpo.learner.optimization.optimizer import (
    ADAM_STATE_BYTES,
    rank_optimizer_state_bytes,
    with_rank_optimizer_state,
)
from ray_ddpo.learner.process_group import buffer_bytes

# The size in the recipes for a CPU. Larger ones were not measured there.
MOST_ON_CPU = 32


def micro_batch_size(policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> int:
    """Return the recipe's micro-batch size.

    If that is "auto", return the largest divisor of a rank's transitions of an optimizer step that fits the device.

    Raises:
        ValueError: not even one transition fits.
    """
    given, per_image = (
        recipe.learner.micro_batch_size,
        algorithm.transitions_per_image(recipe, len(policy.stochastic_steps)),
    )
    if given != "auto":
        return given
    transitions = recipe.learner.images_per_rank * per_image
    on_gpu = policy.device.startswith("cuda")
    sizes = with_rank_optimizer_state(recipe.learner, config.sizes(recipe.sampling, "cuda" if on_gpu else "cpu"))
    if on_gpu:
        limit = gpu_limit(recipe.learner.num_gpus)
        beside = recipe.images_per_round * sizes.conditioning_bytes
        beside += buffer_bytes(sizes.trained_parameters, recipe.learner.world_size)
        trial = StepTrial(policy, algorithm, sizes, rank_optimizer_state_bytes(recipe.learner, sizes))
        found = largest_that_fits(transitions, limit - beside, sizes.learner.largest(limit - beside), trial.peak)
    else:
        limit = (1 - LEFT_FREE) * psutil.virtual_memory().available
        found = largest_divisor(transitions, min(sizes.learner.largest(limit), MOST_ON_CPU))
    if not found:
        advice = (
            "a smaller policy.resolution" if config.gradient_checkpointing else "policy.gradient_checkpointing = true"
        )
        raise ValueError(
            f'learner.micro_batch_size is "auto", and one transition takes {sizes.learner.of(1) / 1e9:.2f} GB of the '
            f"{limit / 1e9:.2f} GB that may be used: give {advice}, or half precision"
        )
    whose = "an optimizer step's" if recipe.learner.world_size == 1 else "a rank's"
    print(
        f"learner.micro_batch_size: {found} of {whose} {transitions} transitions, found for {policy.device}", flush=True
    )
    return found


def gpu_limit(num_gpus: float | int) -> float:
    """Return the bytes that a learner with this share of a GPU may allocate, at most those that are free now."""
    free, total = torch.cuda.mem_get_info()
    own = usable_bytes(min(num_gpus, 1.0) * total if num_gpus else total)
    return min(own, (1 - LEFT_FREE) * (free + torch.cuda.memory_reserved()))


def largest_that_fits(transitions: int, limit: float | int, predicted: int, peak: Callable[[int], float]) -> int:
    """Return the largest divisor of `transitions` whose peak is at most `limit`, or 0 if none is.

    The search starts at the predicted size.
    """
    sizes = [size for size in range(1, transitions + 1) if transitions % size == 0]
    index = max(0, sum(size <= predicted for size in sizes) - 1)
    if peak(sizes[index]) <= limit:
        while index + 1 < len(sizes) and peak(sizes[index + 1]) <= limit:
            index += 1
        return sizes[index]
    return next((size for size in reversed(sizes[:index]) if peak(size) <= limit), 0)


class StepTrial:
    """Trial optimizer steps on synthetic transitions. They need as much memory as real ones, and change nothing."""

    def __init__(
        self, policy: Policy, algorithm: Algorithm, sizes: PolicySizes, state_bytes: int | None = None
    ) -> None:
        """Prepare trials.

        Args:
            state_bytes: size of the optimizer state. None: two float32 numbers for every trained number, as Adam has.
        """
        self._policy = policy
        self._algorithm = algorithm
        self._sizes = sizes
        self._state_bytes = ADAM_STATE_BYTES * sizes.trained_parameters if state_bytes is None else state_bytes

    def peak(self, transitions: int) -> float | int:
        """Return the peak bytes of an optimizer step with micro-batches of this size; infinity if memory runs out."""
        held = parameter_bytes(self._policy.network)
        peak = allocated_peak(lambda: self._step(transitions), self._policy.device, held)
        self._policy.network.zero_grad(set_to_none=True)
        return peak

    def _step(self, transitions: int) -> None:
        """Compute gradients of two micro-batches beside the optimizer state; the second has gradients in memory too."""
        state = torch.empty(self._state_bytes, dtype=torch.uint8, device=self._policy.device)
        for _ in range(2):
            batch = made_up_batch(self._policy, self._algorithm, self._sizes, transitions)
            with IntegerIndices():
                loss = self._algorithm.compute_loss(self._policy, batch).loss
            (loss.sum() / (2 * transitions)).backward()
        del state


def made_up_batch(policy: Policy, algorithm: Algorithm, sizes: PolicySizes, rows: int) -> TransitionBatch | NoisedBatch:
    """Return a batch of zeros with all inputs that the algorithm needs."""

    def latents() -> Tensor:
        return torch.zeros(rows, *policy.latent_shape, device=policy.device)

    def numbers(value: float) -> Tensor:
        return torch.full((rows,), value, device=policy.device)

    conditioning = synthetic_conditioning(sizes.conditioning_shape, sizes.conditioning_dtypes, rows, policy.device)
    steps = torch.full((rows,), policy.stochastic_steps[0], device=policy.device)
    columns = {name: numbers(0.0) if name == "proximal_log_probs" else latents() for name in algorithm.columns}
    if algorithm.noised_samples_per_image is not None:
        return NoisedBatch(conditioning, steps, latents(), latents(), numbers(1.0), **columns)
    return TransitionBatch(conditioning, steps, latents(), latents(), numbers(0.0), numbers(1.0), **columns)
