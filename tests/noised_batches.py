"""Noised samples of tiny models of diffusers' own classes, with predictions of three policies, for tests of losses."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.lora.adapters import reference_policy, trained_parameters
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, select_rows
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import NoisedBatch
from tests.tiny_families import policy_table, save_tiny_flux, save_tiny_sd3
from tests.tiny_policy import scatter, tiny_policy


def in_double(policy: Any) -> Any:
    """Let a policy of diffusers' classes compute in float64, so that any remaining difference is a mistake."""

    def denoise(
        clean_latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        noised, given, target = policy.steps.add_noise(clean_latents.double(), noise.double(), timesteps)
        predicted = policy.predict(noised, given, conditioning)
        assert predicted.dtype == target.dtype == torch.float64
        return predicted, target

    policy.dtype, policy.network, policy.denoise = torch.float64, policy.network.double(), denoise
    return policy


FAMILIES = ("stable_diffusion", "sd3", "flux")
PLACES = [5, 5, 600, 600]  # of the model's own timesteps: on a flow model, the first has a σ of about 0.02
WEIGHTS = [1.0, -0.5, 0.25, -1.0]


@dataclass(frozen=True, kw_only=True)
class NoisedCase:
    """A policy, and four noised samples: two images at each of two timesteps, with equal noise."""

    policy: Any  # in float64
    batch: NoisedBatch  # with all columns
    levels: Tensor  # the noise level t that a loss weights by; 1 on a UNet

    def errors(self, prediction: Tensor | None = None) -> Tensor:
        """Return the mean squared errors of a prediction, or of the current weights', in float64 with gradients."""
        found, target = predict(self.policy, self.batch)
        dims = tuple(range(1, target.ndim))
        return (((found if prediction is None else prediction) - target) ** 2).mean(dim=dims)


def predict(policy: Any, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
    return policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)


def noised_case(family: str, folder: Path, tiny_model: Path, moved: float = 0.02) -> NoisedCase:
    """Return a policy whose weights moved by this deviation since it sampled, and whose adapters were not zero then."""
    if family == "stable_diffusion":
        loaded: Policy = tiny_policy(tiny_model, sampling=SamplingTable(num_steps=4, guidance_scale=1.0))
    else:
        save = {"sd3": save_tiny_sd3, "flux": save_tiny_flux}[family]
        config = build(POLICIES, policy_table(family, save(folder)), "policy")
        loaded = config.load("cpu", SamplingTable(num_steps=4, guidance_scale=1.0), "sampler")
        scatter(loaded.network)
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(4, *loaded.latent_shape, generator=generator)
    noise = torch.randn(2, *loaded.latent_shape, generator=generator).repeat_interleave(2, 0)
    rows = select_rows(loaded.encode(["a cat", "a dog"]), torch.tensor([0, 0, 1, 1]))
    batch = NoisedBatch(rows, torch.tensor(PLACES), clean, noise, torch.tensor(WEIGHTS, dtype=torch.float64))
    policy = in_double(loaded)
    with torch.no_grad():
        with reference_policy(policy.network):
            pretrained, target = predict(policy, batch)
        old, _ = predict(policy, batch)
    scatter(policy.network, deviation=moved, seed=4)
    errors = [(each - target).square().flatten(1).mean(1) for each in (old, pretrained)]
    batch = replace(batch, old_predictions=old, reference_predictions=pretrained)
    batch = replace(batch, old_errors=errors[0], reference_errors=errors[1], groups=torch.tensor([0, 0, 1, 1]))
    return NoisedCase(policy=policy, batch=batch, levels=policy.clean_scale(batch.timesteps).double())


def gradient(policy: Any, loss: Tensor) -> dict[str, np.ndarray]:
    policy.network.zero_grad()
    loss.backward()
    return {name: each.grad.double().numpy().copy() for name, each in trained_parameters(policy.network).items()}
