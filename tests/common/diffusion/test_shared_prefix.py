"""Branching: images of a group share their steps before the window, with the bits of a prefix computed for each."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusionPolicy
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import SharedPrefix, image_noise, sample_trajectories, score
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_policy import tiny_policy

STEPS, WINDOW = 6, range(3, 5)
PROMPTS, SEEDS = ["a cat", "a cat", "a dog", "a dog"], [11, 12, 13, 14]
PREFIX = SharedPrefix(seeds=(11, 11, 13, 13), groups=2)
SAMPLING = SamplingTable(num_steps=STEPS, guidance_scale=3.0, sde_window=2, shared_prefix=True)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> StableDiffusionPolicy:
    return tiny_policy(tiny_model, sampling=SAMPLING)


@pytest.fixture
def network_rows(policy: StableDiffusionPolicy) -> Callable[[], list[int]]:
    """Return a function that gives the rows of each call of the network since the last call."""
    rows: list[int] = []
    handle = policy.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    def taken() -> list[int]:
        found = rows.copy()
        rows.clear()
        return found

    yield taken
    handle.remove()


@torch.no_grad()
def each_images_own(policy: StableDiffusionPolicy, window: range) -> Tensor:
    """Return final latents where every image computes the prefix of its group's seed by itself, two images a batch."""
    conditioning = select_rows(policy.encode(["a cat", "a dog"]), torch.tensor([0, 0, 1, 1]))
    latents = torch.empty(4, *policy.latent_shape)
    for pair in ([0, 2], [1, 3]):  # the rows of a batch decide kernels, so as many as the groups of a task
        rows = {name: value[pair] for name, value in conditioning.items()}
        own = next(image_noise([PREFIX.seeds[row] for row in pair], policy.latent_shape))
        for step in range(window.start):
            own = policy.transition(own, torch.full((2,), step), rows, stochastic=False).mean
        latents[pair] = own
    noise = list(itertools.islice(image_noise(SEEDS, policy.latent_shape), STEPS + 1))
    for step in range(window.start, STEPS):
        transition = policy.transition(latents, torch.full((4,), step), conditioning, step in window)
        latents = transition.sample(noise[step + 1])
    return latents


@pytest.mark.parametrize("window", [WINDOW, range(1, 3), range(4, 6)], ids=str)
def test_a_shared_prefix_has_the_bits_of_each_images_own(policy: StableDiffusionPolicy, window: range) -> None:
    shared = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, window, PREFIX)
    assert torch.equal(shared.final_latents, each_images_own(policy, window))
    assert torch.equal(shared.latents[0, 0], shared.latents[1, 0]), "the window begins at the same latents in a group"
    assert not torch.equal(shared.latents[1, 0], shared.latents[2, 0])
    assert not torch.equal(shared.latents[0, 1], shared.latents[1, 1]), "the noise of the window is each image's own"
    assert shared.steps.tolist() == [list(window)] * 4


def test_the_first_image_of_a_group_is_as_without_a_shared_prefix(policy: StableDiffusionPolicy) -> None:
    alone = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW)
    shared = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW, PREFIX)
    torch.testing.assert_close(shared.final_latents[[0, 2]], alone.final_latents[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (shared.final_latents[[1, 3]] - alone.final_latents[[1, 3]]).abs().max() > 0.1


def test_the_network_runs_on_one_row_a_group_before_the_window(
    policy: StableDiffusionPolicy, network_rows: Callable[[], list[int]]
) -> None:
    sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW, PREFIX)
    assert network_rows() == [4] * 3 + [8] * 3  # with guidance, two rows an image
    sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW)
    assert network_rows() == [8] * 6


def test_the_learner_has_the_samplers_log_probs_after_a_shared_prefix(policy: StableDiffusionPolicy) -> None:
    shared = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW, PREFIX)
    assert torch.equal(score(policy, shared), shared.log_probs) and shared.log_probs.isfinite().all()


def test_with_a_window_at_the_first_step_a_group_shares_its_noise_alone(policy: StableDiffusionPolicy) -> None:
    shared = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, range(2), PREFIX)
    noise = next(image_noise([11, 11, 13, 13], policy.latent_shape))
    assert torch.equal(shared.latents[:, 0], noise)
    assert torch.equal(shared.final_latents, each_images_own(policy, range(2)))


def test_a_group_that_is_left_out_changes_no_bit_of_the_others(policy: StableDiffusionPolicy) -> None:
    whole = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, WINDOW, PREFIX)
    prompts, seeds = [*PROMPTS[:2], *PROMPTS[:1] * 2], [*SEEDS[:2], *SEEDS[:1] * 2]
    left = sample_trajectories(policy, prompts, seeds, SAMPLING, WINDOW, SharedPrefix((11, 11, 11, 11), groups=2))
    assert torch.equal(left.final_latents[:2], whole.final_latents[:2])
