"""A network of one's own: a plain module that predicts noise, given timestep and class."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class ShapeNetwork(nn.Module):
    """A convolutional network with one skip connection. Class `num_classes` means no class."""

    def __init__(self, num_classes: int = 4, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.label = nn.Embedding(num_classes + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(2 * width, 3, 3, padding=1)
        self.shift = nn.Linear(width, 2 * width)

    def forward(
        self, latents: Float[Tensor, "B 3 S S"], timesteps: Int[Tensor, "B"], label: Int[Tensor, "B"]
    ) -> Float[Tensor, "B 3 S S"]:
        """Return the noise in `latents` at `timesteps` of 999 to 0."""
        condition = F.silu(self.time(self._waves(timesteps)) + self.label(label))
        entered = F.silu(self.enter(latents))
        small = F.silu(self.down(entered) + self.shift(condition)[:, :, None, None])
        large = self.up(F.silu(self.middle(small)) + small)
        return self.leave(torch.cat([large, entered], dim=1))

    def _waves(self, timesteps: Int[Tensor, "B"]) -> Float[Tensor, "B W"]:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
        angles = timesteps[:, None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
