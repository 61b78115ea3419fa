"""Flow matching's mean and standard deviation compared with the slow reference, diffusers and the flow's marginals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ray_ddpo.common.diffusion.schedulers.denoising_steps import output_sensitivity
from ray_ddpo.common.diffusion.schedulers.flow_match import FlowMatchTable, flow_match_table
from tests.reference import flow_reference as reference

TOKENS = 1024
SD3 = {"shift": 3.0}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True}


def table(family: str, num_steps: int, level: float = 0.7, **changes: Any) -> FlowMatchTable:
    config = FlowMatchEulerDiscreteScheduler(**((SD3 if family == "sd3" else FLUX) | changes)).config
    return flow_match_table(config, num_steps, level, TOKENS, evenly_spaced=family == "flux")


def sigmas(family: str, num_steps: int) -> list[float]:
    return reference.sd3_sigmas(num_steps, 3.0) if family == "sd3" else reference.flux_sigmas(num_steps, TOKENS)


def latents_and_velocity(num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    return tuple(torch.randn(num_steps, 2, 3, 4, generator=generator) for _ in range(2))


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("num_steps", [4, 10, 28])
def test_the_path_goes_where_its_papers_say(family: str, num_steps: int) -> None:
    ours, expected = table(family, num_steps), sigmas(family, num_steps)
    np.testing.assert_allclose(ours.sigmas.numpy(), expected[:-1], rtol=1e-5)
    np.testing.assert_allclose(ours.next_sigmas.numpy(), expected[1:], rtol=1e-5)
    np.testing.assert_allclose(ours.timesteps.numpy(), [1000 * sigma for sigma in expected[:-1]], rtol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize(("num_steps", "level"), [(10, 0.7), (6, 0.9), (28, 1.0)])
def test_mean_and_deviation_are_the_papers_at_every_step(family: str, num_steps: int, level: float) -> None:
    ours, path = table(family, num_steps, level), sigmas(family, num_steps)
    latents, velocity = latents_and_velocity(num_steps)
    transition = ours.transition(latents, velocity, torch.arange(num_steps))
    for index in range(num_steps):
        s = 0.0 if index == num_steps - 1 else reference.diffusion(path[index], path[1], level)
        means = [
            reference.step(float(x), float(v), path[index], path[index + 1], s)[0]
            for x, v in zip(latents[index].double().flatten(), velocity[index].double().flatten(), strict=True)
        ]
        np.testing.assert_allclose(transition.mean[index].flatten().numpy(), means, rtol=1e-4, atol=1e-5)
        assert float(transition.std[index]) == pytest.approx(s * math.sqrt(path[index] - path[index + 1]), rel=1e-4)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_without_noise_every_step_is_that_of_diffusers_own_scheduler(family: str) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(**(SD3 if family == "sd3" else FLUX))
    keys: dict[str, Any] = {}
    if family == "flux":
        keys = {"sigmas": np.linspace(1.0, 1 / 10, 10), "mu": 0.5 + 0.65 * (TOKENS - 256) / 3840}
    theirs.set_timesteps(10, **keys)
    latents, velocity = latents_and_velocity(10)
    ours = table(family, 10).transition(latents, velocity, torch.arange(10), stochastic=False)
    assert not ours.std.any()
    for index, timestep in enumerate(theirs.timesteps):
        row = slice(index, index + 1)
        expected = theirs.step(velocity[row], timestep, latents[row]).prev_sample
        torch.testing.assert_close(ours.mean[row], expected, rtol=1e-5, atol=1e-6)


def test_a_noise_level_of_zero_is_the_same_as_no_noise() -> None:
    latents, velocity = latents_and_velocity(6)
    silent = table("sd3", 6, level=0.0).transition(latents, velocity, torch.arange(6))
    still = table("sd3", 6).transition(latents, velocity, torch.arange(6), stochastic=False)
    assert torch.equal(silent.mean, still.mean) and not silent.std.any()


def test_the_last_step_has_no_noise_and_all_others_have() -> None:
    std = table("flux", 6).std()
    assert std[-1] == 0 and (std[:-1] > 0.1).all()
    assert output_sensitivity(table("flux", 6))[-1] == torch.inf


@pytest.mark.parametrize("deviation", [0.3, 2.0])
def test_a_path_of_small_steps_ends_in_the_distribution_it_was_made_for(deviation: float) -> None:
    """Use data N(0, c²), for which the best velocity is known.

    A wrong sign or factor would change the final variance.
    """
    ours = table("flux", 1000, level=0.7, use_dynamic_shifting=False, shift=1.0)
    std, variance = ours.std().double(), 1.0
    for index in range(1000):
        sigma = float(ours.sigmas[index])
        of_noised = (1 - sigma) ** 2 * deviation**2 + sigma**2
        velocity = (sigma - (1 - sigma) * deviation**2) / of_noised
        one = torch.ones(1, 1, 1, 1)
        mean = ours.transition(one, velocity * one, torch.tensor([index])).mean
        variance = float(mean) ** 2 * variance + float(std[index]) ** 2
    assert math.sqrt(variance) == pytest.approx(deviation, rel=0.02)


def test_rows_may_be_at_steps_of_their_own() -> None:
    latents, velocity = latents_and_velocity(4)
    ours, steps = table("sd3", 10), torch.tensor([9, 3, 3, 0])
    together = ours.transition(latents, velocity, steps)
    for row in range(4):
        alone = ours.transition(latents[row : row + 1], velocity[row : row + 1], steps[row : row + 1])
        assert torch.equal(together.mean[row], alone.mean[0]) and torch.equal(together.std[row], alone.std[0])


def test_half_precision_inputs_are_computed_in_float32() -> None:
    latents, velocity = (tensor.bfloat16() for tensor in latents_and_velocity(4))
    half = table("sd3", 4).transition(latents, velocity, torch.arange(4))
    full = table("sd3", 4).transition(latents.float(), velocity.float(), torch.arange(4))
    assert half.mean.dtype == torch.float32 and torch.equal(half.mean, full.mean)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_noised_latents_are_at_the_models_training_timesteps(family: str) -> None:
    clean, noise = latents_and_velocity(3)
    timesteps = torch.tensor([999, 499, 0])
    noised, timestep_input, target = table(family, 10).add_noise(clean, noise, timesteps)
    shift = 3.0 if family == "sd3" else 1.0  # FLUX's depends on the image's size, and its training is not shifted by it
    for row, timestep in enumerate(timesteps.tolist()):
        sigma = reference.shifted((timestep + 1) / 1000, shift)
        assert float(timestep_input[row]) == pytest.approx(1000 * sigma, rel=1e-5)
        torch.testing.assert_close(noised[row], (1 - sigma) * clean[row] + sigma * noise[row], rtol=1e-5, atol=1e-6)
    assert torch.equal(target, noise - clean)


@pytest.mark.parametrize("key", ["invert_sigmas", "stochastic_sampling"])
def test_a_schedule_that_is_no_such_flow_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"the model's scheduler has {key}=True: set it to false"):
        table("sd3", 10, **{key: True})
