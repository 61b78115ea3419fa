"""The tiny pipeline as a policy with non-zero adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion, StableDiffusionPolicy
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import Role
from ray_ddpo.common.recipe.tables import SamplingTable

SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)


def tiny_policy(
    model: Path, role: Role = "sampler", sampling: SamplingTable = SAMPLING, **keys: Any
) -> StableDiffusionPolicy:
    """Load the policy. `keys` are those of the recipe's `[policy]`. Equal calls give equal adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = StableDiffusion(model=str(model), **keys).load("cpu", sampling, role)
    scatter(policy.network)
    return policy


@torch.no_grad()
def scatter(network: torch.nn.Module, deviation: float = 0.05, seed: int = 1) -> None:
    """Move every trained parameter, because a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(network).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=deviation)


def pair_step(policy: StableDiffusionPolicy, pairs: int) -> Callable[[], None]:
    """Return a function that gives the trained parameters a gradient from fixed random transitions."""
    generator = torch.Generator().manual_seed(2)
    latents, next_latents = torch.randn(2, pairs, *policy.latent_shape, generator=generator)
    text = policy.network.config.cross_attention_dim
    embeds = torch.randn(2, pairs, 77, text, generator=generator)
    conditioning = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    steps = torch.full((pairs,), policy.stochastic_steps[0])

    def step() -> None:
        policy.transition(latents, steps, conditioning).log_prob(next_latents).sum().backward()

    return step
