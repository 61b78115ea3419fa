"""What every schedule promises: where each step of a path stands, and the distribution of the latents that follow it."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from ray_ddpo.common.diffusion.transition import Transition

Noised = tuple[Tensor, Tensor, Tensor]


class DenoisingSteps(ABC):
    """The T steps of a path. All of their arithmetic is in float32, whatever the network ran in."""

    timesteps: Num[Tensor, "T"]  # as the network is told them

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """Of the model's own schedule, which `noised` numbers from 0."""

    @abstractmethod
    def std(self) -> Float[Tensor, "T"]:
        """The standard deviation of each step; 0 where it has no noise."""

    @abstractmethod
    def transition(
        self,
        latents: Float[Tensor, "B C H W"],
        model_output: Float[Tensor, "B C H W"],
        steps: Int[Tensor, "B"],
        noisy: bool = True,
    ) -> Transition:
        """Each row's step as a distribution. Not `noisy`: the step that the schedule takes without noise."""

    @abstractmethod
    def noised(
        self, clean_latents: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C H W"], timesteps: Int[Tensor, "B"]
    ) -> Noised:
        """The forward process at the model's own `timesteps`: noised latents, what the network is told, what it should say."""

    def clean_scale(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """How far the clean latents move that a prediction at these timesteps stands for, when it moves by one.

        1 if errors are to be measured in what the network predicts.
        """
        return torch.ones(len(timesteps), device=timesteps.device)


def output_sensitivity(steps: DenoisingSteps) -> Float[Tensor, "T"]:
    """|dμ/d output| / σ of each step: by how many σ its mean moves when the output moves by one; infinity where σ is 0."""
    every = torch.arange(len(steps.timesteps), device=steps.timesteps.device)
    zero = torch.zeros(len(every), 1, 1, 1, device=every.device)
    at_zero, at_one = (steps.transition(zero, output, every) for output in (zero, zero + 1))
    return (at_one.mean - at_zero.mean).abs().flatten() / at_one.std


def column(values: Float[Tensor, "B"]) -> Float[Tensor, "B 1 1 1"]:
    """One number a row, to be multiplied with latents."""
    return values.view(-1, 1, 1, 1)
