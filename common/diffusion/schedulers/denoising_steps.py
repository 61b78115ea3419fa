"""The interface of every schedule: its timesteps, and the distribution of the next latents."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

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
        latents: Float[Tensor, "B C H W"],
        model_output: Float[Tensor, "B C H W"],
        steps: Int[Tensor, "B"],
        stochastic: bool = True,
    ) -> Transition:
        """Return each row's step as a distribution. If `stochastic` is False, take the deterministic step."""

    @abstractmethod
    def add_noise(
        self, clean_latents: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], timesteps: Int[Tensor, "B"]
    ) -> NoisedLatents:
        """Run forward diffusion to the model's own `timesteps`."""

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


def column(values: Float[Tensor, "B"]) -> Float[Tensor, "B 1 1 1"]:
    """Return one number per row, shaped to be multiplied with latents."""
    return values.view(-1, 1, 1, 1)
