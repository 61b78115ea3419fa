"""DDIM's mean and standard deviation compared with the slow reference and with diffusers, at every step."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ray_ddpo.common.diffusion.schedulers.ddim import DDIMTable, ddim_table
from ray_ddpo.common.diffusion.schedulers.denoising_steps import output_sensitivity
from tests.reference import ddpo_reference as reference

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
ALPHAS = reference.alphas_cumprod()
CASES = [
    {"set_alpha_to_one": to_one, "timestep_spacing": spacing, "prediction_type": kind}
    for to_one, spacing, kind in product((False, True), ("leading", "trailing"), ("epsilon", "v_prediction", "sample"))
]


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**STABLE_DIFFUSION, **changes})


def table(num_steps: int, eta: float = 1.0, **changes: Any) -> DDIMTable:
    return ddim_table(scheduler(**changes).config, num_steps, eta, "cpu")


def latents_and_output(num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    return tuple(torch.randn(num_steps, 2, 3, 4, generator=generator) for _ in range(2))


def test_fifty_steps_go_from_981_to_1() -> None:
    timesteps = table(50).timesteps.tolist()
    assert timesteps[:3] == [981, 961, 941] and timesteps[-3:] == [41, 21, 1]
    assert timesteps == reference.leading_timesteps(50)


def test_the_step_at_21_of_fifty_is_several_times_as_sensitive_as_the_others() -> None:
    of_all = dict(zip(table(50).timesteps.tolist(), output_sensitivity(table(50)).tolist(), strict=True))
    assert of_all[21] == pytest.approx(3.28, abs=0.01)
    others = [value for timestep, value in of_all.items() if timestep not in (1, 21)]
    assert min(others) > 0.3 and max(others) < 1.1


def test_a_deterministic_step_is_infinitely_sensitive() -> None:
    assert output_sensitivity(table(50, set_alpha_to_one=True))[-1] == torch.inf


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("num_steps", "eta"), [(50, 1.0), (20, 0.5)])
def test_mean_and_deviation_are_the_papers_at_every_step(case: dict, num_steps: int, eta: float) -> None:
    ours = table(num_steps, eta, **case)
    latents, output = latents_and_output(num_steps)
    transition = ours.transition(latents, output, torch.arange(num_steps))
    leading = case["timestep_spacing"] == "leading"
    timesteps = reference.leading_timesteps(num_steps) if leading else reference.trailing_timesteps(num_steps)
    assert ours.timesteps.tolist() == timesteps
    for step, timestep in enumerate(timesteps):
        alpha = float(ALPHAS[timestep])
        following = reference.next_alpha(ALPHAS, timestep, num_steps, case["set_alpha_to_one"])
        sigma = reference.ddim_sigma(alpha, following, eta)
        x, y = latents[step].numpy().astype(np.float64), output[step].numpy().astype(np.float64)
        mean = reference.ddim_mean(*reference.clean_and_noise(case["prediction_type"], x, y, alpha), following, sigma)
        assert float(transition.std[step]) == pytest.approx(sigma, rel=2e-4, abs=1e-12)
        np.testing.assert_allclose(transition.mean[step].numpy(), mean, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("num_steps", "eta"), [(50, 1.0), (50, 0.5), (20, 1.0), (20, 0.5)])
def test_a_step_with_given_noise_lands_where_diffusers_lands(case: dict, num_steps: int, eta: float) -> None:
    theirs = scheduler(**case)
    theirs.set_timesteps(num_steps)
    latents, output = latents_and_output(num_steps)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    ours = table(num_steps, eta, **case).transition(latents, output, torch.arange(num_steps)).sample(noise)
    for step, timestep in enumerate(theirs.timesteps):
        row = slice(step, step + 1)
        expected = theirs.step(output[row], int(timestep), latents[row], eta=eta, variance_noise=noise[row])
        torch.testing.assert_close(ours[row], expected.prev_sample, rtol=1e-5, atol=2e-6)


def test_the_last_step_to_the_clean_image_is_the_step_of_eta_zero() -> None:
    ours, without_noise = table(20, 1.0, set_alpha_to_one=True), table(20, 0.0, set_alpha_to_one=True)
    latents, output = latents_and_output(20)
    steps = torch.arange(20)
    sampled, still = (
        ours.transition(latents, output, steps),
        without_noise.transition(latents, output, steps),
    )
    assert float(sampled.std[-1]) == 0 and (sampled.std[:-1] > 0).all()
    assert torch.equal(sampled.mean[-1], still.mean[-1])
    assert not torch.allclose(sampled.mean[0], still.mean[0], atol=1e-3)


def test_a_deterministic_step_is_the_step_of_eta_zero_not_the_stochastic_mean() -> None:
    ours, without_noise = table(20, 1.0), table(20, 0.0)
    latents, output = latents_and_output(20)
    steps = torch.arange(20)
    still = ours.transition(latents, output, steps, stochastic=False)
    expected = without_noise.transition(latents, output, steps)
    assert torch.equal(still.mean, expected.mean) and not still.std.any()
    assert not torch.allclose(still.mean, ours.transition(latents, output, steps).mean, atol=1e-3)


def test_with_ddpos_schedule_every_step_is_stochastic() -> None:
    assert (table(50).std() > 0).all()


def test_rows_may_be_at_steps_of_their_own() -> None:
    latents, output = latents_and_output(4)
    ours, steps = table(50), torch.tensor([49, 3, 3, 0])
    together = ours.transition(latents, output, steps)
    for row in range(4):
        alone = ours.transition(latents[row : row + 1], output[row : row + 1], steps[row : row + 1])
        assert torch.equal(together.mean[row], alone.mean[0]) and torch.equal(together.std[row], alone.std[0])


def test_half_precision_inputs_are_computed_in_float32() -> None:
    latents, output = (tensor.bfloat16() for tensor in latents_and_output(4))
    half = table(4).transition(latents, output, torch.arange(4))
    full = table(4).transition(latents.float(), output.float(), torch.arange(4))
    assert half.mean.dtype == torch.float32 and torch.equal(half.mean, full.mean)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_a_schedule_that_clips_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"the model's scheduler has {key}=True: its steps are not Gaussian"):
        table(20, **{key: True})


def test_an_unknown_prediction_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'flow': it must be epsilon, v_prediction or sample"):
        table(20, prediction_type="flow")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_training_target_predicts_back_the_clean_latents_and_the_noise(kind: str) -> None:
    clean, noise = latents_and_output(3)
    alphas = torch.tensor([0.9, 0.5, 0.1])
    steps = torch.arange(3)
    schedule = DDIMTable(steps, alphas, alphas, torch.zeros(3), kind, alphas)
    _, _, target = schedule.add_noise(clean, noise, steps)
    for row, alpha in enumerate(alphas.double().tolist()):
        noised = alpha**0.5 * clean[row].double() + (1 - alpha) ** 0.5 * noise[row].double()
        x0, epsilon = reference.clean_and_noise(kind, noised, target[row].double(), alpha)
        torch.testing.assert_close(x0, clean[row].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(epsilon, noise[row].double(), rtol=1e-5, atol=1e-5)


def test_a_table_that_does_not_speak_of_clipping_does_not_clip() -> None:
    betas = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    silent, said = (ddim_table(config, 4, 1.0, "cpu") for config in (betas, {**betas, "clip_sample": False}))
    assert torch.equal(silent.std(), said.std())
    with pytest.raises(ValueError, match="DDIMScheduler without clip_sample, which then clips"):  # this class's default
        ddim_table({**betas, "_class_name": "DDIMScheduler"}, 4, 1.0, "cpu")
