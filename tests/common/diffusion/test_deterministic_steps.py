"""Cached steps and the second-order solver: counted by hand, against exact solutions, and against diffusers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.deterministic_steps import extrapolated, network_steps
from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.rollout import evaluation_window, image_noise, sample_trajectories, score
from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table
from ray_ddpo.common.diffusion.schedulers.denoising_steps import DenoisingSteps
from ray_ddpo.common.diffusion.schedulers.flow_match import flow_match_table
from ray_ddpo.common.diffusion.schedulers.second_order import dpm_solver
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted
from tests.tiny_families import MAKERS, call_keys, policy_table
from tests.tiny_policy import scatter

STEPS = 9
PROMPTS, SEEDS = ["a cat", "a dog", "a cow"], [3, 4, 5]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SPREAD = 2.0  # standard deviation of the Gaussian "images" whose exact flow is known


def sampling(**changes: Any) -> SamplingTable:
    return SamplingTable(**{"num_steps": STEPS, "guidance_scale": 3.0, **changes})


def loaded(name: str, folder: Path) -> DiffusersPolicy:
    config = build(POLICIES, policy_table(name, MAKERS[name](folder)), "policy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = config.load("cpu", sampling(), "sampler")
    scatter(policy.network)
    return policy


@pytest.fixture(scope="module", params=["stable_diffusion", "sd3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusersPolicy:
    """Return a policy that denoises by DDIM, or by flow matching."""
    return loaded(request.param, tmp_path_factory.mktemp("model"))


def calls_of(policy: DiffusersPolicy, sample: Callable[[], Any]) -> tuple[int, Any]:
    calls: list[int] = []
    handle = policy.network.register_forward_pre_hook(lambda *given: calls.append(1))
    result = sample()
    handle.remove()
    return len(calls), result


def test_the_network_runs_at_the_first_two_steps_and_then_at_every_kth() -> None:
    assert sorted(network_steps(range(9), 2)) == [0, 1, 3, 5, 7]
    assert sorted(network_steps(range(4, 12), 3)) == [4, 5, 8, 11]
    assert sorted(network_steps(range(5), 1)) == [0, 1, 2, 3, 4]
    assert network_steps(range(3, 3), 2) == frozenset()


def test_between_runs_the_output_lies_on_the_line_through_the_last_two() -> None:
    earlier, last = (900.0, torch.tensor([[[[1.0, 10.0]]]])), (800.0, torch.tensor([[[[2.0, 8.0]]]]))
    assert extrapolated([earlier, last], 750.0).flatten().tolist() == [2.5, 7.0]
    assert extrapolated([last], 750.0).flatten().tolist() == [2.0, 8.0]


def test_cached_steps_are_the_schedules_with_outputs_by_hand(policy: DiffusersPolicy) -> None:
    cached = sampling(cache_interval=3)
    calls, found = calls_of(policy, lambda: sample_trajectories(policy, PROMPTS, SEEDS, cached, range(0)))
    assert calls == 4  # at the steps 0, 1, 4 and 7 of 9
    rows = policy.encode(PROMPTS)
    rows = {name: value.expand(3, *value.shape[1:]) if "negative" in name else value for name, value in rows.items()}
    latents, known = next(image_noise(SEEDS, policy.latent_shape)), []
    with torch.no_grad():
        for step, timestep in enumerate(policy.steps.timesteps.tolist()):
            if step in (0, 1, 4, 7):
                known.append((timestep, policy.predict(latents, policy.steps.timesteps[[step] * 3], rows)))
            output = known[-1][1]
            if step in (2, 3, 5, 6, 8):
                (before, earlier), (last, output) = known[-2:]
                output = output + (timestep - last) / (last - before) * (output - earlier)
            latents = policy.steps.transition(latents, output, torch.full((3,), step), stochastic=False).mean
    assert torch.equal(found.final_latents, latents)


@pytest.mark.parametrize("changes", [{"cache_interval": 2}, {"solver": "dpmsolver++"}], ids=str)
def test_the_windows_steps_are_the_networks_own_to_the_last_bit(
    policy: DiffusersPolicy, changes: dict[str, Any]
) -> None:
    fast = sampling(sde_window=3, **changes)
    sampled = sample_trajectories(policy, PROMPTS, SEEDS, fast, range(4, 7))
    assert torch.equal(score(policy, sampled), sampled.log_probs) and sampled.log_probs.isfinite().all()
    plain = sample_trajectories(policy, PROMPTS, SEEDS, sampling(sde_window=3), range(4, 7))
    assert not torch.equal(sampled.latents, plain.latents), "other deterministic steps lead to other latents"


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("changes", [{"cache_interval": 2}, {"solver": "dpmsolver++"}], ids=str)
def test_bits_depend_neither_on_earlier_tasks_nor_on_batch_mates(
    policy: DiffusersPolicy, changes: dict[str, Any]
) -> None:
    fast, window = sampling(sde_window=2, **changes), range(4, 6)
    first = sample_trajectories(policy, PROMPTS, SEEDS, fast, window)
    sample_trajectories(policy, PROMPTS[::-1], [8, 9, 10], fast, window)
    again = sample_trajectories(policy, PROMPTS, SEEDS, fast, window)
    assert torch.equal(first.final_latents, again.final_latents)
    others = sample_trajectories(policy, [PROMPTS[0], "a pig", "a hen"], [SEEDS[0], 80, 81], fast, window)
    assert torch.equal(first.final_latents[0], others.final_latents[0])


def test_a_cache_of_every_step_is_no_cache(policy: DiffusersPolicy) -> None:
    plain = sample_trajectories(policy, PROMPTS, SEEDS, sampling(), range(0))
    short = sampling(cache_interval=STEPS).model_copy(update={"num_steps": 2})  # the first two steps run the network
    calls, found = calls_of(policy, lambda: sample_trajectories(policy, PROMPTS, SEEDS, short, range(0)))
    same = sample_trajectories(policy, PROMPTS, SEEDS, sampling(num_steps=2), range(0))
    assert calls == 2 and torch.equal(found.final_latents, same.final_latents)
    assert not torch.equal(plain.final_latents, found.final_latents)


def test_held_out_images_may_have_another_number_of_steps(policy: DiffusersPolicy) -> None:
    few = sampling(num_steps=5)
    calls, found = calls_of(policy, lambda: sample_trajectories(policy, PROMPTS, SEEDS, few))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = policy.config.load("cpu", few, "sampler")
    scatter(own.network)
    assert calls == 5 and torch.equal(found.final_latents, sample_trajectories(own, PROMPTS, SEEDS, few).final_latents)
    assert policy.num_steps == STEPS


def test_evaluation_with_fast_steps_is_deterministic() -> None:
    assert evaluation_window(sampling()) is None
    assert (
        evaluation_window(sampling(solver="dpmsolver++")) == range(0) == evaluation_window(sampling(cache_interval=2))
    )


def denoised(steps: DenoisingSteps, output: Callable[[Tensor, int], Tensor], solver: bool, run: range) -> Tensor:
    """Take the steps of `run` from fixed latents, by the solver or by the schedule's own deterministic steps."""
    latents = torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 1, 1, 5)
    scheduler = dpm_solver(steps.solver_levels(), run.start) if solver else None
    for step in run:
        prediction = output(latents, step)
        if scheduler is None:
            latents = steps.transition(latents, prediction, torch.tensor([step]), stochastic=False).mean.double()
        else:
            latents = scheduler.step(prediction, step, latents, return_dict=False)[0]
    return latents


def gaussian_noise(alpha: float) -> Callable[[Tensor], Tensor]:
    """Return the exact ε for images N(0, SPREAD²): ε = √(1 − ᾱ) x / (ᾱ SPREAD² + 1 − ᾱ)."""
    return lambda latents: math.sqrt(1 - alpha) * latents / (alpha * SPREAD**2 + 1 - alpha)


def middle(num_steps: int) -> range:
    """Return the steps of a run in the middle, where the schedule's levels lie evenly."""
    return range(num_steps // 5, 4 * num_steps // 5)


def ddim_error(num_steps: int, solver: bool) -> float:
    """Return the error after the run's steps, compared with the exact variance-preserving flow x ∝ its deviation."""
    table = ddim_table({**BETAS, "steps_offset": 1, "set_alpha_to_one": False}, num_steps, 1.0, "cpu")
    alphas, run = table.alphas_cumprod.double().tolist(), middle(num_steps)
    found = denoised(table, lambda latents, step: gaussian_noise(alphas[step])(latents), solver, run)
    before, after = (math.sqrt(alphas[step] * SPREAD**2 + 1 - alphas[step]) for step in (run.start, run.stop))
    return float((found.flatten() / torch.linspace(-2, 2, 5, dtype=torch.float64) - after / before)[0].abs())


def flow_error(num_steps: int, solver: bool) -> float:
    """Return the same of a flow from N(0, 1) to N(0, SPREAD²)."""
    table = flow_match_table({"shift": 1.0}, num_steps, 0.7, 1, evenly_spaced=True)
    sigmas, run = table.sigmas.double().tolist(), middle(num_steps)

    def velocity(latents: Tensor, step: int) -> Tensor:  # E[ε − x0 | x] for x = (1 − σ) x0 + σ ε
        sigma = sigmas[step]
        return latents * (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)

    found = denoised(table, velocity, solver, run)
    before, after = (math.hypot((1 - sigmas[step]) * SPREAD, sigmas[step]) for step in (run.start, run.stop))
    return float((found.flatten() / torch.linspace(-2, 2, 5, dtype=torch.float64) - after / before)[0].abs())


@pytest.mark.parametrize("error", [ddim_error, flow_error])
def test_the_solver_is_of_second_order_and_the_schedules_own_step_of_first(
    error: Callable[[int, bool], float],
) -> None:
    coarse, fine = error(20, True), error(40, True)
    coarse_first, fine_first = error(20, False), error(40, False)
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.35)
    assert math.log2(coarse_first / fine_first) == pytest.approx(1, abs=0.2)
    assert fine < fine_first / 5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_solver_knows_what_the_network_predicts(prediction_type: str) -> None:
    """Each parameterization of one exact denoiser leads to the same latents."""
    config = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}
    table = ddim_table({**config, "prediction_type": prediction_type}, 12, 1.0, "cpu")
    alphas = table.alphas_cumprod.double().tolist()

    def output(latents: Tensor, step: int) -> Tensor:
        signal, spread = math.sqrt(alphas[step]), math.sqrt(1 - alphas[step])
        noise = gaussian_noise(alphas[step])(latents)
        clean = (latents - spread * noise) / signal
        return {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[prediction_type]

    reference = ddim_table(config, 12, 1.0, "cpu")
    expected = denoised(reference, lambda latents, step: gaussian_noise(alphas[step])(latents), True, range(12))
    torch.testing.assert_close(denoised(table, output, True, range(12)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [STEPS, 16])
def test_the_solvers_images_are_those_of_diffusers_pipeline_with_its_scheduler(num_steps: int, tmp_path: Path) -> None:
    config = build(POLICIES, policy_table("stable_diffusion", MAKERS["stable_diffusion"](tmp_path)), "policy")
    policy = config.load("cpu", sampling(), "sampler")  # with fresh adapters, which change nothing
    fast = sampling(num_steps=num_steps, solver="dpmsolver++")
    found = sample_trajectories(policy, PROMPTS, SEEDS, fast, range(0))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, final_sigmas_type="sigma_min"
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        timesteps=policy.denoising_steps(fast).timesteps.tolist(),
        guidance_scale=3.0,
        latents=next(image_noise(SEEDS, policy.latent_shape)),
        output_type="latent",
    ).images
    torch.testing.assert_close(found.final_latents, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [4, 16])
def test_the_solver_samples_as_the_scheduler_that_a_sana_is_published_with(num_steps: int, tmp_path: Path) -> None:
    config = build(POLICIES, policy_table("sana", MAKERS["sana"](tmp_path)), "policy")
    policy = config.load("cpu", sampling(), "sampler")
    fast = sampling(num_steps=num_steps, solver="dpmsolver++")
    found = sample_trajectories(policy, PROMPTS[:2], SEEDS[:2], fast, range(0))
    pipeline = diffusers.SanaPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    latents = next(image_noise(SEEDS[:2], policy.latent_shape))
    keys: Any = call_keys("sana", 3.0) | {"num_inference_steps": num_steps, "output_type": "latent"}
    theirs = pipeline(PROMPTS[:2], latents=latents, **keys).images
    torch.testing.assert_close(found.final_latents, theirs, rtol=1e-5, atol=1e-5)
    assert_accepted("the scheduler of SANA as it was published, a solver on the noise levels of a flow")


def test_the_solvers_flow_is_that_of_diffusers_scheduler(tmp_path: Path) -> None:
    """SD3's own pipeline passes noise levels, which this scheduler does not take, so the loop stands here."""
    policy = loaded("sd3", tmp_path)
    fast = sampling(solver="dpmsolver++")
    found = sample_trajectories(policy, PROMPTS, SEEDS, fast, range(0))
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas = torch.cat([policy.steps.sigmas, torch.zeros(1)])
    rows = policy.encode(PROMPTS)
    rows = {name: value.expand(3, *value.shape[1:]) if "negative" in name else value for name, value in rows.items()}
    latents = next(image_noise(SEEDS, policy.latent_shape))
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            output = policy.predict(latents, policy.steps.timesteps[[step] * 3], rows)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(found.final_latents, latents, rtol=1e-5, atol=1e-5)
