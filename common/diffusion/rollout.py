"""Sample trajectories, and re-compute their log-probs under newer weights. Both run the same code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.deterministic_steps import SampledSteps, Step
from ray_ddpo.common.diffusion.path_kl import PathKL
from ray_ddpo.common.diffusion.policy import Conditioning, Policy, select_rows
from ray_ddpo.common.input_images import InputImages, read_inputs
from ray_ddpo.common.prompts import Prompt, refuse_more_inputs
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import DTYPES, Trajectory, adjacent_latents

_TRAINED_STEPS = 6  # hashed with an image's seed to choose its trained steps
_START = 8  # hashed with an image's seed to choose the step where the learner begins again


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


def start_steps(sampling: SamplingTable, seeds: list[int]) -> Int[Tensor, "B"]:
    """Return the step of each image where backpropagation ends, `backprop_steps` before the last one, by its seed."""
    least, most = sampling.backprop_range
    counts = [np.random.default_rng([seed, _START]).integers(least, most + 1) for seed in seeds]
    return sampling.num_steps - torch.tensor(np.array(counts), dtype=torch.long)


def evaluation_window(sampling: SamplingTable) -> range | None:
    """Return the SDE window for images that are not trained on: an empty one, if deterministic steps are asked for."""
    return None if sampling.sde_window is None and not sampling.trains_no_steps else range(0)


def refuse_window_without_noise(policy: Policy, sampling: SamplingTable) -> None:
    """Raise ValueError if the SDE window can cover a step that this model takes without noise."""
    reached = range(sampling.skip_first_steps, sampling.num_steps - sampling.skip_last_steps)
    silent = sorted(set(reached) - set(policy.stochastic_steps))
    if sampling.sde_window is not None and silent:
        raise ValueError(
            f"sampling.sde_window can cover the steps {silent}, which have no noise with this model: "
            f"let it end before them with skip_last_steps = {sampling.num_steps - silent[0]}"
        )


@dataclass(frozen=True)
class SharedPrefix:
    """The deterministic steps before the window, computed once for each group of a task (branching)."""

    seeds: tuple[int, ...]  # one per image: of the noise that its group begins with
    groups: int  # rows of the prefix's batch, which stay equal if images are left out, so that bits do


@torch.no_grad()
def sample_trajectories(
    policy: Policy,
    prompts: list[str],
    seeds: list[int],
    sampling: SamplingTable,
    window: range | None = None,
    prefix: SharedPrefix | None = None,
    path_kl: PathKL | None = None,
    inputs: InputImages | None = None,
) -> Trajectory:
    """Sample one trajectory per prompt and seed, with its log-probs. `inputs` has one row per prompt.

    Latents are rounded to `latents_dtype` after each step. The steps of `window` are stochastic and trained on.
    If it is None, all steps are stochastic, and the recipe chooses the trained ones. With a `prefix`, the images of a
    group share their latents up to the window, and an image's seed gives the noise of the window alone.
    """
    latents_dtype = DTYPES[sampling.latents_dtype]
    conditioning, prompt_index, selected = encoded_prompts(policy, prompts, inputs)
    rows = policy.rows_of_task(selected)
    # Generated lazily: the CPU makes a step's noise while the GPU still computes the step before.
    generated = image_noise(seeds, policy.latent_shape)
    noise = (to_device(each, policy.device) for each in generated)

    steps = SampledSteps(policy, sampling)
    latents, first = policy.initial_latents(next(noise)).to(latents_dtype), 0
    if sampling.deterministic and window != range(0):
        taken, log_prob, before, after, last, sequence = _without_noise(steps, latents, rows, next(noise))
        fields = taken, log_prob, before, after
        starts = _starts(sampling, seeds, torch.stack(sequence, dim=1))
        return Trajectory(conditioning, prompt_index, *fields, policy.finished(last, rows), *starts)
    if prefix is not None and window is not None:
        before = range(window.start)
        latents, first = _prefix_latents(policy, steps, selected, prefix, before, latents_dtype), window.start
        for _ in range(first):  # the window's noise is the image's own, as without a prefix
            next(generated)
    sequence, log_probs = [latents], []  # one more latents than steps
    for step, step_of_run in _in_runs(steps, window, first, path_kl):
        transition = step_of_run(latents, step, rows)
        # Round, then compute the log-prob, and continue from the rounded value: the learner's ratio is then exactly 1.
        latents = transition.sample(next(noise)).to(latents_dtype)
        log_probs.append(transition.log_prob(latents))
        sequence.append(latents)
    all_latents, all_log_probs = torch.stack(sequence, dim=1), torch.stack(log_probs, dim=1)
    trained = _trained_steps(steps.stochastic_steps, sampling, window, seeds)
    taken = to_device(trained - first, policy.device)  # index into the steps that were kept
    fields = trained, all_log_probs.gather(1, taken), *_latents_of(all_latents, trained - first, taken)
    starts = _starts(sampling, seeds, all_latents)
    return Trajectory(conditioning, prompt_index, *fields, policy.finished(all_latents[:, -1], rows), *starts)


def inputs_of(policy: Policy, prompts: Sequence[Prompt]) -> InputImages | None:
    """Read the prompts' input images, if the policy reads any. Raise ValueError if a prompt has none, or too many."""
    if not policy.reads_inputs:
        return None
    refuse_more_inputs(prompts, policy.most_inputs, type(policy).__name__)
    size = policy.image_size()
    assert size is not None, "a family that reads input images knows the size of its own"
    return read_inputs([prompt.metadata for prompt in prompts], size)


def encoded_prompts(
    policy: Policy, prompts: list[str], inputs: InputImages | None = None
) -> tuple[Conditioning, Int[Tensor, "B"], Conditioning]:
    """Return the conditioning of the distinct prompts, each image's prompt among them, and one row per image."""
    contents = [""] * len(prompts) if inputs is None else inputs.contents
    keys = list(zip(prompts, contents, strict=True))
    distinct = list(dict.fromkeys(keys))
    prompt_index = torch.tensor([distinct.index(key) for key in keys])
    firsts = [keys.index(key) for key in distinct]
    given = () if inputs is None else (inputs.select(firsts),)
    conditioning = policy.encode([prompts[first] for first in firsts], *given)
    return conditioning, prompt_index, select_rows(conditioning, to_device(prompt_index, policy.device))


def _starts(
    sampling: SamplingTable, seeds: list[int], latents: Float[Tensor, "B T1 C *S"]
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B C *S"]] | tuple[()]:
    """Return where the learner begins again, and the latents there; nothing if the recipe needs no gradients of rewards."""
    if sampling.backprop_steps is None:
        return ()
    steps = start_steps(sampling, seeds)
    return steps, latents[torch.arange(len(steps)), steps]


def _trained_steps(
    stochastic: list[int], sampling: SamplingTable, window: range | None, seeds: list[int]
) -> Int[Tensor, "B W"]:
    """Return the steps that each image is trained on: the window, or those that the recipe chooses."""
    if window is not None:
        return trained_steps(list(window), len(window), seeds)
    candidates = stochastic[sampling.skip_first_steps : len(stochastic) - sampling.skip_last_steps]
    return trained_steps(candidates, sampling.trained_steps(len(stochastic)), seeds)


def _without_noise(
    steps: SampledSteps, start: Float[Tensor, "B C *S"], rows: Conditioning, noise: Float[Tensor, "B C *S"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Take all steps without noise. Sample one stochastic step aside, whose log-prob proves which weights sampled.

    That step starts at the same latents as the first one, from the same network output. The trajectory goes on without
    it.

    Returns:
        Steps, log-probs, latents before and after, and final latents of a `Trajectory`; the latents between its steps.
    """
    run, sequence, dtype = range(steps.num_steps), [start], start.dtype
    take, aside, log_prob = steps.predicted_run(run), start, torch.empty(0)
    for step in run:
        sequence.append(take(sequence[-1], step, rows).mean.to(dtype))
        if step == run.start:
            stochastic = steps.side_step(start, step)
            aside = stochastic.sample(noise).to(dtype)
            log_prob = stochastic.log_prob(aside)
    taken = torch.zeros(len(start), 1, dtype=torch.long)
    return taken, log_prob.unsqueeze(1), start.unsqueeze(1), aside.unsqueeze(1), sequence[-1], sequence


def _in_runs(
    steps: SampledSteps, window: range | None, first: int, path_kl: PathKL | None
) -> Iterator[tuple[int, Step]]:
    """Yield each step from `first` on with the function that takes it. Steps before and after the window are two runs.

    The function of stochastic steps also adds them to `path_kl`.
    """
    last = steps.num_steps
    stochastic = range(first, last) if window is None else window or range(last, last)
    action = steps.transition if path_kl is None else path_kl.watched(steps.transition, steps.stochastic_steps)
    for run in (range(first, stochastic.start), range(stochastic.stop, last)):
        take = steps.deterministic_run(run)
        yield from ((step, take) for step in run)
        if run.stop == stochastic.start:
            yield from ((step, action) for step in stochastic)


def _prefix_latents(
    policy: Policy, steps: SampledSteps, rows: Conditioning, prefix: SharedPrefix, run: range, dtype: torch.dtype
) -> Float[Tensor, "B C *S"]:
    """Take the steps before the window once per group. Return the latents that each image continues from."""
    seeds = list(dict.fromkeys(prefix.seeds))
    batch = seeds + seeds[:1] * (prefix.groups - len(seeds))
    leaders = to_device(torch.tensor([prefix.seeds.index(seed) for seed in batch]), policy.device)
    rows = policy.rows_of_task({name: value[leaders] for name, value in rows.items()})
    noise = to_device(next(image_noise(batch, policy.latent_shape)), policy.device)
    latents, take = policy.initial_latents(noise).to(dtype), steps.deterministic_run(run)
    for step in run:
        latents = take(latents, step, rows).mean.to(dtype)
    return latents[to_device(torch.tensor([seeds.index(seed) for seed in prefix.seeds]), policy.device)]


def _latents_of(
    latents: Float[Tensor, "B T1 C *S"], steps: Int[Tensor, "B W"], on_device: Int[Tensor, "B W"]
) -> tuple[Float[Tensor, "B W C *S"], Float[Tensor, "B W C *S"]]:
    """Return the latents before and after each trained step; views, if all images train the same run of steps.

    Args:
        latents: on the device.
        steps: on the CPU, so that comparing them does not wait for the device.
        on_device: the same steps on the device.
    """
    count = steps.shape[1]
    first = int(steps[0, 0]) if count else 0
    if torch.equal(steps, torch.arange(first, first + count).expand_as(steps)):
        return adjacent_latents(latents[:, first : first + count + 1])
    rows = torch.arange(len(latents), device=latents.device).unsqueeze(1)
    return latents[rows, on_device], latents[rows, on_device + 1]


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
