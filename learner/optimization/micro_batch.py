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
from ray_ddpo.common.trajectory import NUMBER_COLUMNS, NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from ray_ddpo.learner.optimization.optimizer import (
    ADAM_STATE_BYTES,
    rank_optimizer_state_bytes,
    rank_sizes,
)
from ray_ddpo.learner.process_group import buffer_bytes
from ray_ddpo.learner.sharding.layout import shards_weights

# The size in the recipes for a CPU. Larger ones were not measured there.
MOST_ON_CPU = 32


def micro_batch_size(policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> int:
    """Return the recipe's micro-batch size.

    If that is "auto", return the largest divisor of a rank's transitions of an optimizer step that fits the device.

    Raises:
        ValueError: not even one transition fits.
    """
    given = recipe.learner.micro_batch_size
    if given != "auto":
        return given
    search = MicroBatchSearch(policy, config, algorithm, recipe)
    found = search.largest()
    if not found:
        advice = (
            "a smaller policy.resolution" if config.gradient_checkpointing else "policy.gradient_checkpointing = true"
        )
        raise ValueError(
            f'learner.micro_batch_size is "auto", and one transition takes {search.sizes.learner.of(1) / 1e9:.2f} GB '
            f"of the {search.limit / 1e9:.2f} GB that may be used: give {advice}, or half precision"
        )
    whose = "an optimizer step's" if recipe.learner.world_size == 1 else "a rank's"
    print(
        f"learner.micro_batch_size: {found} of {whose} {search.transitions} transitions, found for {policy.device}",
        flush=True,
    )
    return found


class MicroBatchSearch:
    """The search for micro-batches that fit the learner's device, by trial on a GPU and by prediction on a CPU."""

    def __init__(self, policy: Policy, config: PolicyConfig, algorithm: Algorithm, recipe: Recipe) -> None:
        """Measure the memory that may be used. `config` must say whether the network re-computes its activations."""
        steps = len(policy.stochastic_steps)
        self.transitions = recipe.learner.images_per_rank * algorithm.transitions_per_image(recipe, steps)
        on_gpu = policy.device.startswith("cuda")
        sizes = config.sizes(recipe.sampling, "cuda" if on_gpu else "cpu")
        self.sizes = rank_sizes(recipe.learner, algorithm.learner_sizes(sizes))
        self._beside, self._trial, self._most = 0, None, self.transitions if on_gpu else MOST_ON_CPU
        if on_gpu:
            self.limit = gpu_limit(recipe.learner.num_gpus)
            if recipe.learner.colocated:  # in its turn, all of the GPU but what the sampler keeps while it sleeps
                share = recipe.learner.num_gpus + recipe.samplers.num_gpus
                self.limit = gpu_limit(share, processes=2, beside=self.sizes.sampling.fixed)
            self._beside = recipe.images_per_round * self.sizes.conditioning_bytes
            self._beside += buffer_bytes(self.sizes.trained_parameters, recipe.learner.world_size)
            # A trial that runs out of memory on one rank would leave the others waiting in a sharded pass.
            if not shards_weights(recipe.learner):
                state_bytes = rank_optimizer_state_bytes(recipe.learner, self.sizes)
                self._trial = StepTrial(policy, algorithm, self.sizes, state_bytes)
        else:
            self.limit = (1 - LEFT_FREE) * psutil.virtual_memory().available

    def largest(self) -> int:
        """Return the largest divisor of a rank's transitions of an optimizer step that fits; 0 if none does."""
        limit = self.limit - self._beside
        predicted = self.sizes.learner.largest(limit)
        if self._trial is None:
            return largest_divisor(self.transitions, min(predicted, self._most))
        return largest_that_fits(self.transitions, limit, predicted, self._trial.peak)

    def fits(self, size: int) -> bool:
        """Return whether an optimizer step with micro-batches of this size fits."""
        peak = self.sizes.learner.of(size) if self._trial is None else self._trial.peak(size)
        return peak <= self.limit - self._beside


def gpu_limit(num_gpus: float | int, processes: int = 1, beside: float | int = 0) -> float:
    """Return the bytes that a learner with this share of a GPU may allocate, at most those that are free now.

    Args:
        num_gpus: the share.
        processes: number of processes that have the share together.
        beside: bytes that the others of them hold.
    """
    free, total = torch.cuda.mem_get_info()
    own = usable_bytes(min(num_gpus, 1.0) * total if num_gpus else total, processes) - beside
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


def made_up_batch(
    policy: Policy, algorithm: Algorithm, sizes: PolicySizes, rows: int
) -> TransitionBatch | NoisedBatch | RestartBatch:
    """Return a batch of zeros with all inputs that the algorithm needs."""

    def latents() -> Tensor:
        return torch.zeros(rows, *policy.latent_shape, device=policy.device)

    def numbers(value: float) -> Tensor:
        return torch.full((rows,), value, device=policy.device)

    conditioning = synthetic_conditioning(sizes.conditioning_shape, sizes.conditioning_dtypes, rows, policy.device)
    steps = torch.full((rows,), policy.stochastic_steps[0], device=policy.device)
    columns = {name: numbers(0.0) if name in NUMBER_COLUMNS else latents() for name in algorithm.columns}
    if isinstance(algorithm, RewardGradient):
        first = policy.num_steps - algorithm.most_steps
        noise = {step: latents() for step in policy.stochastic_steps if step >= first}
        prompts = [algorithm.trial_prompts[row % len(algorithm.trial_prompts)] for row in range(rows)]
        texts, metadata = tuple(each.text for each in prompts), tuple(each.metadata for each in prompts)
        return RestartBatch(conditioning, (first,) * rows, latents(), noise, texts, metadata)
    if algorithm.noised_samples_per_image is not None:
        # Of a loss that compares groups, a trial's rows are compared with nothing, because its size is any.
        coupling = torch.ones(rows, 4, device=policy.device) if algorithm.compares_groups else None
        return NoisedBatch(conditioning, steps, latents(), latents(), numbers(1.0), **columns, coupling=coupling)
    return TransitionBatch(conditioning, steps, latents(), latents(), numbers(0.0), numbers(1.0), **columns)
