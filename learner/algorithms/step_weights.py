"""Weights of a trajectory's steps in the loss: the recipe's numbers, or one by each step's noise."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.runtime import to_device

StepWeights = tuple[float, ...] | Literal["noise_level"]


def check_step_weights(given: StepWeights, num_steps: int) -> None:
    """Raise ValueError if the recipe's numbers are not one per step, negative, or all 0."""
    if isinstance(given, str) or not given:
        return
    if len(given) != num_steps or min(given) < 0 or not any(given):
        raise ValueError(
            f"algorithm.step_weights has {len(given)} numbers from {min(given)} to {max(given)}: it must have "
            f'sampling.num_steps = {num_steps} of them, none below 0 and not all of them 0, or be "noise_level"'
        )


def noise_level_weights(std: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """Return each step's standard deviation over the mean of the stochastic ones (TempFlow-GRPO, arXiv 2508.04324).

    The authors' code has the constant 2.25 for this mean's inverse, which is that of their SD3.5 schedule.

    Args:
        std: of each step; 0 where the step is deterministic.
    """
    return std * (std > 0).sum() / std.sum()


def weights_of_steps(given: StepWeights, policy: Policy, device: str) -> Float[Tensor, "T"] | None:
    """Return the weight of each step; None if all are 1.

    Raises:
        ValueError: The weights are those of the noise, and the policy has no schedule as `steps`.
    """
    if not given:
        return None
    if given != "noise_level":
        return to_device(torch.tensor(given), device)
    steps = getattr(policy, "steps", None)
    if not isinstance(steps, DenoisingSteps):
        raise ValueError(
            f'algorithm.step_weights is "noise_level", and {type(policy).__name__} has no DenoisingSteps as its '
            "attribute steps, whose std they follow from: give one number per step, or give the family such steps"
        )
    return noise_level_weights(steps.std())
