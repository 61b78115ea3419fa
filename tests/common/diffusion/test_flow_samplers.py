"""Stochastic samplers of flow models: the authors' steps in float64, kept marginals, and a ratio of exactly 1."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.diffusion.rollout import sample_trajectories, score
from ray_ddpo.common.diffusion.schedulers.flow_match import CPSTable, FlowMatchTable, flow_match_table
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.reference import flow_samplers_reference as reference
from tests.tiny_families import FROM_OUTSIDE, MAKERS, policy_table
from tests.tiny_families import PROMPTS as OUTSIDE_PROMPTS
from tests.tiny_policy import scatter

KINDS = list(reference.SAMPLERS)
MEAN, SPREAD = 1.5, 0.5  # of the Gaussian "images" whose exact velocity is known


def table(kind: str, num_steps: int, level: float, shift: float = 1.0) -> FlowMatchTable:
    return flow_match_table({"shift": shift}, num_steps, level, 1, evenly_spaced=True, sde=kind)


def levels_of(steps: FlowMatchTable) -> list[float]:
    """Return the T + 1 noise levels, of which the first may differ from 1 by a rounding error."""
    return [min(1.0, sigma) for sigma in [*steps.sigmas.double().tolist(), 0.0]]


def latents_and_velocity(num_steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    return tuple(torch.randn(num_steps, 2, 3, 4, generator=generator) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_steps", "shift", "level"), [(10, 3.0, 0.7), (6, 1.0, 0.9), (16, 3.0, 0.3), (25, 12.0, 1.0), (4, 0.5, 0.05)]
)
def test_steps_are_the_authors(kind: str, num_steps: int, shift: float, level: float) -> None:
    ours = table(kind, num_steps, level, shift)
    (latents, velocity), levels = latents_and_velocity(num_steps), levels_of(ours)
    found = ours.transition(latents, velocity, torch.arange(num_steps))
    following = found.sample(torch.ones_like(latents))
    log_probs = found.log_prob(following)
    for index in range(num_steps - 1):
        args = (latents[index].double(), velocity[index].double(), levels, index, level)
        mean, std = reference.SAMPLERS[kind](*args)
        np.testing.assert_allclose(found.mean[index].double(), mean, rtol=1e-4, atol=2e-5)
        assert float(found.std[index]) == pytest.approx(std, rel=1e-4)
        expected = reference.log_prob(following[index].double(), mean, std)
        assert float(log_probs[index]) == pytest.approx(expected, rel=1e-3, abs=2e-3)
    euler = latents[-1] - levels[-2] * velocity[-1]  # theirs too: DanceGRPO decodes the last predicted x0
    torch.testing.assert_close(found.mean[-1], euler, rtol=1e-5, atol=1e-6)
    assert not found.std[-1] and log_probs[-1] == -math.inf


def test_flow_sde_is_the_default_with_its_bits() -> None:
    (latents, velocity), steps = latents_and_velocity(10), torch.arange(10)
    by_default = flow_match_table({"shift": 3.0}, 10, 0.7, 1, False)
    named = flow_match_table({"shift": 3.0}, 10, 0.7, 1, False, "flow")
    one, other = (each.transition(latents, velocity, steps) for each in (by_default, named))
    assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
    assert type(by_default) is FlowMatchTable and type(table("cps", 4, 0.5).to("cpu")) is CPSTable


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_step_is_the_same_of_all_samplers(kind: str) -> None:
    latents, velocity = latents_and_velocity(10)
    steps = torch.arange(10)
    found = table(kind, 10, 0.7, 3.0).transition(latents, velocity, steps, stochastic=False)
    euler = table("flow", 10, 0.7, 3.0).transition(latents, velocity, steps, stochastic=False)
    assert torch.equal(found.mean, euler.mean) and not found.std.any()


def test_full_noise_of_cps_replaces_all_predicted_noise() -> None:
    latents, velocity = latents_and_velocity(5)
    steps = table("cps", 5, 1.0)
    found = steps.transition(latents, velocity, torch.arange(5))
    clean = latents - steps.sigmas.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(found.mean, (1 - steps.next_sigmas).view(-1, 1, 1, 1) * clean)
    torch.testing.assert_close(found.std, steps.next_sigmas)


def small_angle(num_steps: int) -> float:
    """Return a level of CPS whose noise vanishes with the steps as that of an SDE does: a new share of 1/T a step."""
    return math.asin(1 / math.sqrt(num_steps)) * 2 / math.pi


def marginal_errors(
    steps: FlowMatchTable, spread: float = SPREAD, rows: int = 20_000, below: float = 1.0
) -> tuple[float, float]:
    """Return the largest errors of mean and standard deviation over all steps that end below a noise level.

    Errors are in exact standard deviations.
    """
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 1, 1, 1, generator=generator)
    of_mean, of_std = [], []
    for index, sigma in enumerate(steps.sigmas.tolist()[:-1]):
        velocity = reference.exact_velocity(latents, sigma, MEAN, spread)
        transition = steps.transition(latents, velocity, torch.full((rows,), index))
        latents = transition.sample(torch.randn(latents.shape, generator=generator))
        mean, std = reference.exact_marginal(float(steps.next_sigmas[index]), MEAN, spread)
        if float(steps.next_sigmas[index]) < below:
            of_mean.append(abs(float(latents.mean()) - mean) / std)
            of_std.append(abs(float(latents.std()) / std - 1))
    return max(of_mean), max(of_std)


MANY = 150
SAMPLING_ERROR = (4 / math.sqrt(20_000), 4 / math.sqrt(2 * 20_000))  # four standard errors of mean and deviation
DISCRETIZATION = (0.01, 0.03)  # of 150 steps


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "level"), [("flow", 0.7), ("flow", 1.0), ("dance", 0.3), ("dance", 1.0), ("cps", small_angle(MANY))]
)
def test_marginals_are_kept_by_many_small_steps(kind: str, level: float, shift: float) -> None:
    """All steps of Dance-SDE and CPS are small. Flow-SDE's are not near pure noise, as the next test shows."""
    of_mean, of_std = marginal_errors(table(kind, MANY, level, shift), below=0.8 if kind == "flow" else 1.0)
    assert of_mean < SAMPLING_ERROR[0] + DISCRETIZATION[0] and of_std < SAMPLING_ERROR[1] + DISCRETIZATION[1]


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_the_first_step_of_flow_sde_widens_pure_noise_whatever_the_number_of_steps(num_steps: int) -> None:
    """Its noise is a at σ = 1, as s² grows like 1 / dt there. The deviation after it is √(1 + a⁴/4) of pure noise."""
    steps, rows = table("flow", num_steps, 0.9), torch.zeros(2, dtype=torch.long)
    pure = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    means = steps.transition(pure, torch.zeros_like(pure), rows).mean.flatten()  # velocity adds less than 2 / T
    widened = math.hypot(float(means[1] - means[0]), float(steps.std()[0]))
    assert widened == pytest.approx(math.sqrt(1 + 0.9**4 / 4), rel=1e-4)


@pytest.mark.parametrize(("kind", "level"), [("flow", 0.7), ("dance", 0.7), ("cps", small_angle(MANY))])
def test_a_wrong_coefficient_does_not_keep_marginals(kind: str, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the mean of the deterministic step with the noise of the stochastic one: the score's term is missing."""
    right = table(kind, MANY, level)
    step = type(right).transition

    def wrong(self: FlowMatchTable, latents: Tensor, output: Tensor, steps: Tensor, stochastic: bool = True) -> Any:
        return Transition(step(self, latents, output, steps, False).mean, self.std()[steps])

    monkeypatch.setattr(type(right), "transition", wrong)
    assert marginal_errors(right)[1] > 2 * (SAMPLING_ERROR[1] + DISCRETIZATION[1])


def test_few_steps_of_cps_keep_the_marginals_of_one_image_and_few_of_flow_sde_do_not() -> None:
    """With one image as data, predicted image and noise are the true ones, whose coefficients CPS preserves."""
    cps = marginal_errors(table("cps", 6, 0.8), spread=0.0)
    assert cps[0] < SAMPLING_ERROR[0] and cps[1] < SAMPLING_ERROR[1]
    assert marginal_errors(table("flow", 6, 0.8), spread=0.0)[1] > 0.2


def test_cps_at_a_fixed_level_narrows_a_wide_distribution() -> None:
    """More steps do not help: each replaces noise, and the predicted image has less spread than the images."""
    few, many = (marginal_errors(table("cps", steps, 0.8))[1] for steps in (10, MANY))
    assert few > 0.05 and many > 0.05


def test_the_papers_clip_range_of_cps_is_ours_over_twice_the_variance() -> None:
    (latents, velocity), levels = latents_and_velocity(5), levels_of(table("cps", 5, 0.8))
    for index in range(4):
        args = [latents[index].double(), velocity[index].double(), levels, index, 0.8]
        old, std = reference.cps(*args)
        new, _ = reference.cps(args[0], args[1] + 1e-3, *args[2:])
        following = old + std
        ours = reference.log_prob(following, new, std) - reference.log_prob(following, old, std)
        theirs = [reference.log_prob_without_constants(following, mean) for mean in (new, old)]
        assert theirs[0] - theirs[1] == pytest.approx(2 * std**2 * ours, rel=1e-6)


PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image", "z_image", "flux2_klein", "sana", "digits:Digits"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_exactly_one_and_bits_are_the_samplers(family: str, kind: str, tmp_path: Path) -> None:
    model = (MAKERS | FROM_OUTSIDE)[family](tmp_path / "model")
    config = build(POLICIES, policy_table(family, model), "policy", PolicyConfig)
    sampling = SamplingTable(num_steps=5, guidance_scale=3.0, eta=0.7, sde=kind, latents_dtype="bfloat16")
    config.check_sampling(sampling)
    policies: list[Policy] = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policies.append(config.load("cpu", sampling, "sampler"))
        scatter(policies[-1].network)
    sampled = sample_trajectories(policies[0], OUTSIDE_PROMPTS.get(family, PROMPTS)[:2], SEEDS, sampling)
    assert sampled.steps.shape == (2, 4) and sampled.log_probs.isfinite().all()
    assert torch.equal(torch.exp(score(policies[1], sampled) - sampled.log_probs), torch.ones(2, 4))


def test_samplers_sample_different_images(tmp_path: Path) -> None:
    config, finals = build(POLICIES, policy_table("sd3", MAKERS["sd3"](tmp_path)), "policy"), []
    for kind in (None, "flow", "dance", "cps"):
        sampling = SamplingTable(num_steps=5, eta=0.7, sde=kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = config.load("cpu", sampling, "sampler")
        finals.append(sample_trajectories(policy, PROMPTS, SEEDS, sampling).final_latents)
    assert torch.equal(finals[0], finals[1])
    assert all((finals[0] - other).abs().max() > 1e-3 for other in finals[2:])


@pytest.mark.parametrize("family", ["stable_diffusion", "shapes:Shapes"])
def test_a_family_without_a_flow_refuses_a_sampler_of_flows(family: str, tmp_path: Path) -> None:
    model = (MAKERS | FROM_OUTSIDE)[family](tmp_path / "model")
    config = build(POLICIES, policy_table(family, model), "policy", PolicyConfig)
    with pytest.raises(ValueError, match=r"sampling.sde is 'cps', and \w+ takes none: only families of flow matching"):
        config.check_sampling(SamplingTable(num_steps=5, sde="cps"))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_noise_level_above_one_is_for_flow_and_dance_alone(kind: Any, tiny_model: Path, tmp_path: Path) -> None:
    settings = SamplingTable(num_steps=5, eta=1.2, sde=kind)
    flow = build(POLICIES, policy_table("sd3", tmp_path), "policy", PolicyConfig)
    if kind == "cps":
        with pytest.raises(ValueError, match=r'sampling.eta is 1.2, with sampling.sde "cps": it must be .* at most 1'):
            flow.check_sampling(settings)
    else:
        flow.check_sampling(settings)
    unet = build(POLICIES, policy_table("stable_diffusion", tiny_model), "policy", PolicyConfig)
    if kind is None:
        with pytest.raises(ValueError, match=r"sampling.eta is 1.2, with StableDiffusion, whose steps are DDIM's"):
            unet.check_sampling(settings)
