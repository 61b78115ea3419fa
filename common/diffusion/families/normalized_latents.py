"""Latents with a mean and a standard deviation for each channel, as the decoders of Qwen-Image and Wan have them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy


class NormalizedLatentsPolicy(DiffusersPolicy):
    """A loaded pipeline whose decoder's configuration gives `latents_mean` and `latents_std`."""

    def _statistics(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield mean and standard deviation of the channels, which broadcast over `latents`."""
        for values in (self.vae.config.latents_mean, self.vae.config.latents_std):
            shape = (1, -1, *[1] * (latents.ndim - 2))
            yield torch.tensor(values, device=latents.device, dtype=latents.dtype).view(shape)

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents / (1.0 / deviation) + mean  # rounded as the pipelines do

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) * (1.0 / deviation)
