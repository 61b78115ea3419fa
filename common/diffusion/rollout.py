"""Sample trajectories, and give the same trajectories their log_prob again under newer weights: side by side."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, select_rows
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import DTYPES, Trajectory, split_path

_KEPT_STEPS = 6  # what an image's seed is hashed with to choose them


def image_noise(seeds: list[int], shape: tuple[int, ...]) -> Iterator[Float[Tensor, "B ..."]]:
    """Standard normal noise again and again, a row an image from its own seed and on the CPU: nothing else decides it.

    One sample after the other, as diffusers samples with a generator for each image.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def trained_steps(candidates: list[int], count: int, seeds: list[int]) -> Int[Tensor, "B W"]:
    """Which `count` of the candidate steps each image is learned from: in order, and decided by its seed alone."""
    if count == len(candidates):
        return torch.tensor(candidates, dtype=torch.long).expand(len(seeds), count)
    chosen = [np.random.default_rng([seed, _KEPT_STEPS]).permutation(candidates)[:count] for seed in seeds]
    return torch.from_numpy(np.sort(np.stack(chosen), axis=1))


def evaluation_window(sampling: SamplingTable) -> range | None:
    """For images to be looked at and not learned from: as the recipe samples, but no noise where it has a window of it."""
    return None if sampling.sde_window is None else range(0)


def refuse_window_without_noise(policy: Policy, sampling: SamplingTable) -> None:
    """ValueError: the window may come to stand on a step that has no noise with this model, which is no action."""
    reached = range(sampling.num_steps - sampling.skip_last_steps)
    silent = sorted(set(reached) - set(policy.stochastic_steps))
    if sampling.sde_window is not None and silent:
        raise ValueError(
            f"sampling.sde_window may come to stand on the steps {silent}, which have no noise with this model: "
            f"let it end before them with skip_last_steps = {sampling.num_steps - silent[0]}"
        )


@torch.no_grad()
def sample_trajectories(
    policy: Policy, prompts: list[str], seeds: list[int], sampling: SamplingTable, window: range | None = None
) -> Trajectory:
    """One denoising path for each prompt and seed, rounded to `latents_dtype` step by step, with its log-probs.

    `window`: the steps that have noise and are kept; None: all have noise, and those are kept that the recipe says.
    """
    latents_dtype = DTYPES[sampling.latents_dtype]
    distinct = list(dict.fromkeys(prompts))
    prompt_index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    conditioning = policy.encode(distinct)
    rows = select_rows(conditioning, prompt_index.to(policy.device))
    # Sampled when it is needed: a GPU is then still at the step before, for which nobody waits.
    noise = (to_device(each, policy.device) for each in image_noise(seeds, policy.latent_shape))

    latents = policy.initial_latents(next(noise)).to(latents_dtype)
    path, log_probs = [latents], []
    for step in range(policy.num_steps):
        steps = torch.full((len(seeds),), step, device=policy.device)
        transition = policy.transition(latents, steps, rows, window is None or step in window)
        # Rounded first, then scored, and the path goes on from the rounded value: so the learner's ratio is exactly 1.
        latents = transition.sample(next(noise)).to(latents_dtype)
        log_probs.append(transition.log_prob(latents))
        path.append(latents)
    whole_path, all_log_probs = torch.stack(path, dim=1), torch.stack(log_probs, dim=1)
    if window is None:
        stochastic_steps = policy.stochastic_steps
        candidates = stochastic_steps[: len(stochastic_steps) - sampling.skip_last_steps]
        kept = trained_steps(candidates, sampling.trained_steps(len(stochastic_steps)), seeds)
    else:
        kept = trained_steps(list(window), len(window), seeds)
    before, after = _steps_of(whole_path, kept.to(policy.device))
    kept_log_probs = all_log_probs.gather(1, kept.to(policy.device))
    return Trajectory(conditioning, prompt_index, kept, kept_log_probs, before, after, whole_path[:, -1])


def _steps_of(
    path: Float[Tensor, "B T1 C H W2"], kept: Int[Tensor, "B W"]
) -> tuple[Float[Tensor, "B W C H W2"], Float[Tensor, "B W C H W2"]]:
    """The latents entering and leaving the steps kept: views of the path where they are neighbours, the same for all."""
    count = kept.shape[1]
    first = int(kept[0, 0]) if count else 0
    if torch.equal(kept, torch.arange(first, first + count, device=kept.device).expand_as(kept)):
        return split_path(path[:, first : first + count + 1])
    rows = torch.arange(len(path), device=path.device).unsqueeze(1)
    return path[rows, kept], path[rows, kept + 1]


@torch.no_grad()
def score(policy: Policy, trajectory: Trajectory) -> Float[Tensor, "B W"]:
    """The log_prob that `policy` gives to each kept step of `trajectory`, in batches composed as they were sampled."""
    conditioning = {name: value.to(policy.device) for name, value in trajectory.conditioning.items()}
    rows = select_rows(conditioning, trajectory.prompt_index.to(policy.device))
    columns = []
    for place in range(trajectory.steps.shape[1]):
        latents, next_latents = trajectory.latents[:, place], trajectory.next_latents[:, place]
        transition = policy.transition(latents.to(policy.device), trajectory.steps[:, place].to(policy.device), rows)
        columns.append(transition.log_prob(next_latents.to(policy.device)))
    return torch.stack(columns, dim=1)
