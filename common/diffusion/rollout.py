"""Sample trajectories, and re-compute their log-probs under newer weights. Both run the same code."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, select_rows
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import DTYPES, Trajectory, adjacent_latents

_TRAINED_STEPS = 6  # hashed with an image's seed to choose its trained steps


def image_noise(seeds: list[int], shape: tuple[int, ...]) -> Iterator[Float[Tensor, "B ..."]]:
    """Yield standard normal noise for each step, one row per image.

    Each image has its own generator on the CPU, seeded with its seed: neither batch nor device changes the noise.
    Rows are generated one by one, as diffusers does with one generator per image.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def trained_steps(candidates: list[int], count: int, seeds: list[int]) -> Int[Tensor, "B W"]:
    """Choose `count` of the candidate steps for each image, in ascending order, by the image's seed only."""
    if count == len(candidates):
        return torch.tensor(candidates, dtype=torch.long).expand(len(seeds), count)
    chosen = [np.random.default_rng([seed, _TRAINED_STEPS]).permutation(candidates)[:count] for seed in seeds]
    return torch.from_numpy(np.sort(np.stack(chosen), axis=1))


def evaluation_window(sampling: SamplingTable) -> range | None:
    """Return the SDE window for images that are not trained on: an empty one, if the recipe has a window at all."""
    return None if sampling.sde_window is None else range(0)


def refuse_window_without_noise(policy: Policy, sampling: SamplingTable) -> None:
    """Raise ValueError if the SDE window can cover a step that this model takes without noise."""
    reached = range(sampling.num_steps - sampling.skip_last_steps)
    silent = sorted(set(reached) - set(policy.stochastic_steps))
    if sampling.sde_window is not None and silent:
        raise ValueError(
            f"sampling.sde_window can cover the steps {silent}, which have no noise with this model: "
            f"let it end before them with skip_last_steps = {sampling.num_steps - silent[0]}"
        )


@torch.no_grad()
def sample_trajectories(
    policy: Policy, prompts: list[str], seeds: list[int], sampling: SamplingTable, window: range | None = None
) -> Trajectory:
    """Sample one trajectory per prompt and seed, with its log-probs.

    Latents are rounded to `latents_dtype` after each step. The steps of `window` are stochastic and trained on.
    If it is None, all steps are stochastic, and the recipe chooses the trained ones.
    """
    latents_dtype = DTYPES[sampling.latents_dtype]
    distinct = list(dict.fromkeys(prompts))
    prompt_index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    conditioning = policy.encode(distinct)
    rows = select_rows(conditioning, prompt_index.to(policy.device))
    # Generated lazily: the CPU makes a step's noise while the GPU still computes the step before.
    noise = (to_device(each, policy.device) for each in image_noise(seeds, policy.latent_shape))

    latents = policy.initial_latents(next(noise)).to(latents_dtype)
    sequence, log_probs = [latents], []  # one more latents than steps
    for step in range(policy.num_steps):
        steps = torch.full((len(seeds),), step, device=policy.device)
        transition = policy.transition(latents, steps, rows, window is None or step in window)
        # Round, then compute the log-prob, and continue from the rounded value: the learner's ratio is then exactly 1.
        latents = transition.sample(next(noise)).to(latents_dtype)
        log_probs.append(transition.log_prob(latents))
        sequence.append(latents)
    all_latents, all_log_probs = torch.stack(sequence, dim=1), torch.stack(log_probs, dim=1)
    if window is None:
        stochastic_steps = policy.stochastic_steps
        candidates = stochastic_steps[: len(stochastic_steps) - sampling.skip_last_steps]
        trained = trained_steps(candidates, sampling.trained_steps(len(stochastic_steps)), seeds)
    else:
        trained = trained_steps(list(window), len(window), seeds)
    before, after = _latents_of(all_latents, trained.to(policy.device))
    trained_log_probs = all_log_probs.gather(1, trained.to(policy.device))
    return Trajectory(conditioning, prompt_index, trained, trained_log_probs, before, after, all_latents[:, -1])


def _latents_of(
    latents: Float[Tensor, "B T1 C H W2"], steps: Int[Tensor, "B W"]
) -> tuple[Float[Tensor, "B W C H W2"], Float[Tensor, "B W C H W2"]]:
    """Return the latents before and after each trained step; views, if all images train the same run of steps."""
    count = steps.shape[1]
    first = int(steps[0, 0]) if count else 0
    if torch.equal(steps, torch.arange(first, first + count, device=steps.device).expand_as(steps)):
        return adjacent_latents(latents[:, first : first + count + 1])
    rows = torch.arange(len(latents), device=latents.device).unsqueeze(1)
    return latents[rows, steps], latents[rows, steps + 1]


@torch.no_grad()
def score(policy: Policy, trajectory: Trajectory) -> Float[Tensor, "B W"]:
    """Return the log-prob under `policy` of each trained step of `trajectory`, in batches composed as in sampling."""
    conditioning = {name: value.to(policy.device) for name, value in trajectory.conditioning.items()}
    rows = select_rows(conditioning, trajectory.prompt_index.to(policy.device))
    columns = []
    for column in range(trajectory.steps.shape[1]):
        latents, next_latents = trajectory.latents[:, column], trajectory.next_latents[:, column]
        transition = policy.transition(latents.to(policy.device), trajectory.steps[:, column].to(policy.device), rows)
        columns.append(transition.log_prob(next_latents.to(policy.device)))
    return torch.stack(columns, dim=1)
