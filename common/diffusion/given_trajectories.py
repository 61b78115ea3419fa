"""Encode given images into final latents, in place of sampling trajectories."""

import numpy as np
import torch
from jaxtyping import UInt8

from ray_ddpo.common.diffusion.deterministic_steps import SampledSteps
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.rollout import encoded_prompts, image_noise
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import DTYPES, Trajectory


@torch.no_grad()
def given_trajectories(
    policy: Policy, prompts: list[str], seeds: list[int], sampling: SamplingTable, pixels: UInt8[np.ndarray, "B H W 3"]
) -> Trajectory:
    """Return trajectories that end in the latents of given images.

    If the encoder has a posterior, latents are sampled from it, as in the training of Stable Diffusion and as the
    authors of Diffusion-DPO do; the image's seed gives their noise. As in sampling without noise, one stochastic step
    is kept, from the noise of the image's seed: its log-prob proves which weights the sampler has.
    """
    dtype, steps = DTYPES[sampling.latents_dtype], SampledSteps(policy, sampling)
    conditioning, prompt_index, selected = encoded_prompts(policy, prompts)
    noise = (to_device(each, policy.device) for each in image_noise(seeds, policy.latent_shape))
    start = policy.initial_latents(next(noise)).to(dtype)
    steps.predict(start, 0, policy.rows_of_task(selected))
    stochastic = steps.side_step(start, 0)
    aside = stochastic.sample(next(noise)).to(dtype)
    log_prob = stochastic.log_prob(aside)
    images = to_device(torch.from_numpy(pixels), policy.device)
    return Trajectory(
        conditioning=conditioning,
        prompt_index=prompt_index,
        steps=torch.zeros(len(seeds), 1, dtype=torch.long),
        log_probs=log_prob.unsqueeze(1),
        latents=start.unsqueeze(1),
        next_latents=aside.unsqueeze(1),
        final_latents=policy.encode_images(images, next(noise)).to(dtype),
    )
