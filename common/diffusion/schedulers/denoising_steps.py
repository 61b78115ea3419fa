"""The interface of every schedule: its timesteps, and the distribution of the next latents."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ray_ddpo.common.diffusion.schedulers.second_order import SolverLevels
from ray_ddpo.common.diffusion.transition import Transition

NoisedLatents = tuple[Tensor, Tensor, Tensor]  # noised latents, timestep input, prediction target


class DenoisingSteps(ABC):
    """The T steps of a trajectory. All arithmetic is in float32, whatever dtype the network ran in."""

    timesteps: Num[Tensor, "T"]  # the network's timestep inputs

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """Return the length of the model's own schedule, which `add_noise` indexes from 0."""

    @abstractmethod
    def std(self) -> Float[Tensor, "T"]:
        """Return the standard deviation of each step; 0 where the step is deterministic."""

    @abstractmethod
    def transition(
        self,
        latents: Float[Tensor, "B C *S"],
        model_output: Float[Tensor, "B C *S"],
        steps: Int[Tensor, "B"],
        stochastic: bool = True,
    ) -> Transition:
        """Return each row's step as a distribution. If `stochastic` is False, take the deterministic step."""

    @abstractmethod
    def add_noise(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], timesteps: Int[Tensor, "B"]
    ) -> NoisedLatents:
        """Run forward diffusion to the model's own `timesteps`."""

    def solver_levels(self) -> SolverLevels:
        """Return the noise levels between the steps, for a solver of second order.

        Raises:
            ValueError: The schedule has none that such a solver knows. This is the default.
        """
        raise ValueError(
            f"solver is 'dpmsolver++', and {type(self).__name__} has no solver_levels: give solver = \"first_order\""
        )

    def clean(
        self, latents: Float[Tensor, "B C *S"], model_output: Float[Tensor, "B C *S"], steps: Int[Tensor, "B"]
    ) -> Float[Tensor, "B C *S"]:
        """Return the clean latents that the network's output at these steps implies.

        Raises:
            ValueError: The schedule does not tell. This is the default.
        """
        raise ValueError(f"{type(self).__name__} has no clean, which refl needs: take draft or alignprop")

    def noised(
        self, clean_latents: Float[Tensor, "B C *S"], noise: Float[Tensor, "B C *S"], step: int
    ) -> Float[Tensor, "B C *S"]:
        """Add noise to clean latents up to the noise level where a step starts.

        Raises:
            ValueError: The schedule does not tell. This is the default.
        """
        raise ValueError(f"{type(self).__name__} has no noised, which draft_lv needs: take draft")

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return by how much the predicted clean latents change if the prediction changes by one.

        1 means that errors are measured in the network's own parameterization.
        """
        return torch.ones(len(timesteps), device=timesteps.device)


def output_sensitivity(steps: DenoisingSteps) -> Float[Tensor, "T"]:
    """Return |dμ/d output| / σ of each step: by how many σ the mean moves per unit of output; infinity where σ is 0."""
    every = torch.arange(len(steps.timesteps), device=steps.timesteps.device)
    zero = torch.zeros(len(every), 1, 1, 1, device=every.device)
    at_zero, at_one = (steps.transition(zero, output, every) for output in (zero, zero + 1))
    return (at_one.mean - at_zero.mean).abs().flatten() / at_one.std


def step_sizes(steps: object, owner: str = "the policy") -> Float[Tensor, "T"]:
    """Return |dx'/d output| of each deterministic step: how far the next latents move per unit of output.

    In flow matching this is −dt, because the Euler step is x + v dt.

    Raises:
        ValueError: The owner's `steps` are no schedule.
    """
    if not isinstance(steps, DenoisingSteps):
        raise ValueError(
            f"algorithm.name is 'grpo_guard', which divides each step's loss by its size, and {owner} has no "
            "step_sizes: give the policy `steps`, which are DenoisingSteps, or override step_sizes; or take grpo"
        )
    every = torch.arange(len(steps.timesteps), device=steps.timesteps.device)
    zero = torch.zeros(len(every), 1, 1, 1, device=every.device)
    at_zero, at_one = (steps.transition(zero, output, every, stochastic=False).mean for output in (zero, zero + 1))
    return (at_one - at_zero).abs().flatten()
