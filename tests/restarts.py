"""Restarts of sampled trajectories, and a slow reference that goes through all steps and detaches by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, select_rows
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import RestartBatch, Trajectory
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from tests.double_policy import DoublePolicy
from tests.tiny_policy import scatter, tiny_policy

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]


def smooth_reward(pixels: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Return a smooth function of all pixels, another one for each prompt."""
    weights = torch.linspace(-1, 2, pixels[0].numel(), dtype=pixels.dtype).view(pixels.shape[1:])
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=pixels.dtype)
    return (pixels * weights).flatten(1).mean(1) * lengths + (pixels**2).flatten(1).mean(1)


def with_reward(algorithm: RewardGradient, reward: Reward = smooth_reward) -> RewardGradient:
    """Return the algorithm with a loaded reward of weight 1."""
    algorithm._loaded["smooth"] = (1.0, reward)
    return algorithm


class DoubleSteps(DenoisingSteps):
    """Noise levels of the float64 policy, for predictions of clean latents alone."""

    timesteps = torch.tensor([750.0, 500.0, 250.0])
    num_train_timesteps = 1000

    def clean(self, latents: Tensor, model_output: Tensor, steps: Tensor) -> Tensor:
        signal = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)[steps].view(-1, 1, 1, 1)
        return (latents.double() - (1 - signal**2).sqrt() * model_output) / signal

    def std(self) -> Tensor:
        raise AssertionError("no step is taken here")

    transition = add_noise = std


class DoubleDecoding(DoublePolicy):
    """The float64 policy with a decoder in float64, without the clamping that has no derivative at its ends."""

    steps = DoubleSteps()

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self._predicted(latents, timesteps, conditioning)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        self._inner.vae.double()
        pixels = self._inner.vae.decode(self._inner._unscaled(latents), return_dict=False)[0]
        return pixels.sigmoid()


def double_policy(model: Path, num_steps: int = 3) -> DoubleDecoding:
    return DoubleDecoding(tiny_policy(model, sampling=SamplingTable(num_steps=num_steps, guidance_scale=1.0)))


def restart_batch(
    policy: Policy, trajectory: Trajectory, seeds: list[int], prompts: list[str], stochastic: list[int]
) -> RestartBatch:
    """Return all images of a trajectory as restarts, with noise that is generated here by itself."""
    noise = {}
    for step, each in zip(range(-1, policy.num_steps), image_noise(seeds, policy.latent_shape), strict=False):
        if step in stochastic:
            noise[step] = each
    rows = select_rows(trajectory.conditioning, trajectory.prompt_index)
    starts = tuple(trajectory.start_steps.tolist())
    return RestartBatch(rows, starts, trajectory.start_latents, noise, tuple(prompts), ({},) * len(prompts))


def sampled(policy: Policy, prompts: list[str], seeds: list[int], sampling: SamplingTable, window: range | None = None):
    """Sample a trajectory, and return its restarts beside it."""
    trajectory = sample_trajectories(policy, prompts, seeds, sampling, window)
    stochastic = policy.stochastic_steps if window is None else list(window)
    return trajectory, restart_batch(policy, trajectory, seeds, prompts, stochastic)


def detached_by_hand(
    policy: Policy, prompts: list[str], seeds: list[int], starts: list[int], window: range | None = None
) -> Tensor:
    """Take every step from the initial noise with gradients, and detach each image's latents at its start."""
    distinct = list(dict.fromkeys(prompts))
    rows = select_rows(policy.encode(distinct), torch.tensor([distinct.index(each) for each in prompts]))
    noise = image_noise(seeds, policy.latent_shape)
    latents = policy.initial_latents(next(noise))
    for step in range(policy.num_steps):
        held = torch.tensor([step <= start for start in starts]).view(-1, 1, 1, 1)
        latents = torch.where(held, latents.detach(), latents)
        has_noise = step in (policy.stochastic_steps if window is None else window)
        transition = policy.transition(latents, torch.full((len(seeds),), step), rows, has_noise)
        latents = transition.sample(next(noise))
    return latents


def moved_policy(model: Path, sampling: SamplingTable):
    policy = tiny_policy(model, sampling=sampling)
    scatter(policy.network, seed=3)
    return policy
