"""Take the last denoising steps again with gradients, from latents that the sampler stored."""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ray_ddpo.common.differentiable_reward import straight_through
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.diffusion.policy import Conditioning, Policy
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.trajectory import DTYPES, RestartBatch

Output = TypeVar("Output")


def steps_of(policy: Policy, given: str) -> DenoisingSteps:
    """Return the policy's schedule, whose noise levels some algorithms need.

    Args:
        given: the setting that needs them, as the error says it.

    Raises:
        ValueError: The policy has none.
    """
    steps = getattr(policy, "steps", None)
    if not isinstance(steps, DenoisingSteps):
        raise ValueError(
            f"{given}, which needs the noise levels of the model's schedule, and {type(policy).__name__} has no `steps` of "
            "DenoisingSteps: take draft or alignprop without kl_coef, which need none"
        )
    return steps


def denoised_to_the_end(policy: Policy, batch: RestartBatch, recompute: bool = False) -> Float[Tensor, "B C *S"]:
    """Return the final latents of `denoised`, without a comparison with the pretrained model."""
    return denoised(policy, batch, recompute, None)[0]


def denoised(
    policy: Policy, batch: RestartBatch, recompute: bool, compared: DenoisingSteps | None
) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B"] | None]:
    """Take each row's steps from its start to the last, with gradients.

    This is backpropagation through the sampling process, truncated before `batch.starts` (DRaFT-K, arXiv 2309.17400,
    algorithm 1; AlignProp, arXiv 2310.03739, section 4.3). Steps have the noise that the sampler's had.

    Args:
        policy: the policy, with gradients of what is trained.
        batch: where to begin.
        recompute: keep only the latents between steps, and re-compute a step's activations in the backward pass.
        compared: the policy's schedule, if its predictions are to be compared with the pretrained model's.

    Returns:
        The final latents; and the mean of `prediction_shift` over each row's steps, if it was asked for.
    """
    latents = _as_floating(batch.latents)
    shifts = latents.new_zeros(len(latents))
    for step in range(min(batch.starts), policy.num_steps):
        index = torch.tensor([row for row, start in enumerate(batch.starts) if start <= step], device=latents.device)
        if len(index) == len(latents):
            latents, shift = _step(policy, batch, latents, step, None, recompute, compared)
            shifts = shifts if shift is None else shifts + shift
        else:
            taken, shift = _step(policy, batch, latents[index], step, index, recompute, compared)
            latents = latents.index_copy(0, index, taken)
            shifts = shifts if shift is None else shifts.index_add(0, index, shift)
    if compared is None:
        return latents, None
    return latents, shifts / torch.tensor([policy.num_steps - start for start in batch.starts], device=latents.device)


def _step(
    policy: Policy,
    batch: RestartBatch,
    latents: Tensor,
    step: int,
    index: Tensor | None,
    recompute: bool,
    compared: DenoisingSteps | None,
) -> tuple[Float[Tensor, "R C *S"], Float[Tensor, "R"] | None]:
    """Take one step of the rows of `index`, or of all rows, as the sampler takes it."""
    conditioning, noise = batch.conditioning, batch.noise.get(step)
    if index is not None:
        conditioning = {name: value[index] for name, value in conditioning.items()}
        noise = None if noise is None else noise[index]
    steps = torch.full((len(latents),), step, device=latents.device)
    reference = None if compared is None else pretrained_prediction(policy, compared, latents, steps, conditioning)

    def take(latents: Tensor) -> tuple[Tensor, Tensor | None]:
        if compared is None or reference is None:
            transition, shift = policy.transition(latents, steps, conditioning, stochastic=noise is not None), None
        else:
            predicted = policy.predict(latents, compared.timesteps[steps], conditioning)
            transition = compared.transition(latents, predicted, steps, noise is not None)
            shift = prediction_shift(predicted, reference)
        return (transition.mean if noise is None else transition.sample(noise)), shift

    taken, shift = recomputed(take, latents) if recompute else take(latents)
    return _rounded(taken, batch.latents_dtype), shift


@torch.no_grad()
def pretrained_prediction(
    policy: Policy, table: DenoisingSteps, latents: Tensor, steps: Tensor, conditioning: Conditioning
) -> Float[Tensor, "R C *S"]:
    """Return what the pretrained model predicts at these latents and steps, guided as in sampling."""
    with reference_policy(policy.network):
        return policy.predict(latents.detach(), table.timesteps[steps], conditioning)


def prediction_shift(predicted: Float[Tensor, "R C *S"], reference: Tensor) -> Float[Tensor, "R"]:
    """Return ‖ε − ε_ref‖² per latent element: a step's KL up to a factor of its noise levels.

    Source: DRaFT+ (`calculate_gaussian_kl_penalty_shared_var` in NVIDIA's NeMo-Aligner). Unlike the KL, it also exists
    for deterministic steps.
    """
    return (predicted.float() - reference.float()).square().flatten(1).mean(1)


def recomputed(work: Callable[[Tensor], Output], argument: Tensor) -> Output:
    """Call `work`, and call it again in the backward pass instead of keeping its activations. Its bits stay the same."""
    return checkpoint(work, argument, use_reentrant=False, preserve_rng_state=False)  # no work here is random


def _rounded(latents: Tensor, dtype: str) -> Tensor:
    """Round to the sampler's storage dtype. Rounding has the gradient of the identity."""
    if dtype == "float32":
        return latents
    return straight_through(latents, latents.to(DTYPES[dtype]).to(latents.dtype))


def _as_floating(latents: Tensor) -> Tensor:
    return latents if latents.dtype in (torch.float32, torch.float64) else latents.float()
