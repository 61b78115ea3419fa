"""One denoising step as a distribution. Sampler and learner share this code."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def column(values: Float[Tensor, "B"], like: Float[Tensor, "B C *S"]) -> Tensor:
    """Return one number per row, shaped to be multiplied with latents."""
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Transition:
    """N(mean, std² I) over the next latents (DDPO, section 4.1), in float32. std 0 marks a deterministic step."""

    mean: Float[Tensor, "B C *S"]
    std: Float[Tensor, "B"]

    def sample(self, noise: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Return the next latents for standard normal `noise`."""
        return self.mean + column(self.std, self.mean) * noise

    def kl_nats(self, other: "Transition") -> Float[Tensor, "B"]:
        """Return the KL to another distribution of equal σ: ‖μ − μ'‖² / (2σ²), in nats, with gradient."""
        moved = (self.mean - other.mean) / column(self.std, self.mean)
        return 0.5 * moved.square().flatten(1).sum(1)

    def log_prob(self, next_latents: Float[Tensor, "B C *S"]) -> Float[Tensor, "B"]:
        """Return the Gaussian log-density of `next_latents` in nats, averaged over latent elements.

        It is −inf where std is 0, because a deterministic step is not an action.
        """
        std = column(self.std, self.mean)
        deviation = (next_latents.float() - self.mean) / std
        log_density = -0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi)
        # Mean, not sum, over latent elements: clip_range was tuned at this scale (DDPO, Black et al. 2023).
        return torch.where(self.std > 0, log_density.flatten(1).mean(1), -math.inf)
