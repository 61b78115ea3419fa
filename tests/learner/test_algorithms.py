"""Every algorithm's loss and gradient in float64, on eight numbers: against slow references and finite differences."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion.policy import Conditioning, Policy
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms import ALGORITHMS
from tests.reference import algorithms_reference as others
from tests.reference import ddpo_reference as reference
from tests.reference import trust_region_reference as trust

STD = 0.5
PAIRS, SHAPE = 6, (2, 2, 2)
STEPS = [0, 1, 2, 0, 1, 2]
SIZES = [0.3, 0.2, 0.05]  # of the steps
ADVANTAGES = [1.5, -2.0, 0.3, -7.0, 9.0, -0.4]  # two of them beyond the limit of 5
WORTH = [1.0, 0.0, 0.25, 0.5, 0.9, 2.0]


class Toy(Policy):
    """A network that weighs what comes in, number by number: μ and the prediction are θ · x."""

    device, num_steps, num_train_timesteps, latent_shape = "cpu", 3, 1000, SHAPE

    def __init__(self) -> None:
        self.network = nn.ParameterDict({"theta": torch.linspace(0.5, 1.2, 8, dtype=torch.float64).reshape(SHAPE)})

    @property
    def stochastic_steps(self) -> list[int]:
        return [0, 1, 2]

    def compile(self, batch_size: int) -> None:
        raise NotImplementedError

    def transition(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, stochastic: bool = True
    ) -> Transition:
        return Transition(self.network["theta"] * latents, torch.full((len(latents),), STD, dtype=torch.float64))

    def step_sizes(self) -> Tensor:
        return torch.tensor(SIZES, dtype=torch.float64)

    def denoise(self, clean_latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning):
        return self.network["theta"] * (clean_latents + noise), noise

    def encode(self, prompts: list[str]) -> Conditioning:
        raise AssertionError("nothing is encoded here")

    def initial_latents(self, noise: Tensor) -> Tensor:
        raise AssertionError("nothing is sampled here")

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("nothing is looked at here")

    def save(self, folder: Path) -> Path:
        raise AssertionError("nothing is saved here")

    def restore(self, path: Path) -> None:
        raise AssertionError("nothing is restored here")


def normal(seed: int) -> Tensor:
    return torch.randn(PAIRS, *SHAPE, generator=torch.Generator().manual_seed(seed)).double()


def path_batch(shifts: list[float]) -> TransitionBatch:
    """Return transitions whose policy has moved: old log-probs are `shifts` below those of the current weights."""
    latents, toy = normal(1), Toy()
    means = (toy.network["theta"].detach() * latents).numpy()
    next_latents = torch.from_numpy(means + STD * normal(2).numpy()).float().double()
    rows = zip(next_latents.numpy(), means, shifts, strict=True)
    old = [reference.gaussian_log_density(value, mean, STD) - shift for value, mean, shift in rows]
    return TransitionBatch(
        {"prompt_embeds": torch.zeros(PAIRS, 1, 1)},
        torch.tensor(STEPS),
        latents,
        next_latents,
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(ADVANTAGES, dtype=torch.float64),
    )


def noised_batch() -> NoisedBatch:
    return NoisedBatch(
        {"prompt_embeds": torch.zeros(PAIRS, 1, 1)},
        torch.arange(PAIRS),
        normal(3),
        normal(4),
        torch.tensor(WORTH, dtype=torch.float64),
        normal(5),
    )


Slow = Callable[[np.ndarray, int], float]  # θ and a pair's place → its loss


def log_prob(theta: np.ndarray, batch: TransitionBatch, row: int) -> float:
    return reference.gaussian_log_density(batch.next_latents[row].numpy(), theta * batch.latents[row].numpy(), STD)


def limited(row: int) -> float:
    return min(max(ADVANTAGES[row], -5.0), 5.0)


def surrogate(batch: TransitionBatch, clip_range: float) -> Slow:
    old = batch.old_log_probs.tolist()
    return lambda theta, row: reference.clipped_surrogate(
        log_prob(theta, batch, row), old[row], limited(row), clip_range
    )


def bounded(batch: TransitionBatch, low: float, high: float, dual: float | None = None) -> Slow:
    old = batch.old_log_probs.tolist()
    return lambda theta, row: trust.clipped_surrogate(
        math.exp(log_prob(theta, batch, row) - old[row]), limited(row), low, high, dual
    )


def log_ratio_and_means(batch: TransitionBatch, theta: np.ndarray, row: int, proximal: bool):
    """Return the log-ratio of a transition, and its mean under the current and the older policy."""
    before = (batch.proximal_means if proximal else batch.behavior_means)[row].numpy()
    value, mean = batch.next_latents[row].numpy(), theta * batch.latents[row].numpy()
    old = reference.gaussian_log_density(value, before, STD) if proximal else batch.old_log_probs[row].item()
    return reference.gaussian_log_density(value, mean, STD) - old, (mean, before)


def guarded(batch: TransitionBatch, clip: float, proximal: bool = False) -> Slow:
    def loss(theta: np.ndarray, row: int) -> float:
        log_ratio, means = log_ratio_and_means(batch, theta, row, proximal)
        sqrt_dt = math.sqrt(SIZES[STEPS[row]])
        return trust.guard_loss(log_ratio, means, (STD / sqrt_dt, sqrt_dt), limited(row), clip)

    return loss


def trusted(batch: TransitionBatch, threshold: float, proximal: bool = False) -> Slow:
    """Return Flow-DPPO's loss, whose mask is that of the policy at which the slope is taken."""
    start = Toy().network["theta"].detach().numpy()

    def loss(theta: np.ndarray, row: int) -> float:
        log_ratio, means = log_ratio_and_means(batch, theta, row, proximal)
        masked = trust.dppo_loss(*log_ratio_and_means(batch, start, row, proximal), STD, limited(row), threshold) == 0
        return 0.0 if masked else trust.dppo_loss(log_ratio, means, STD, limited(row), math.inf)

    return loss


def pulled(batch: TransitionBatch, clip_range: float, coefficient: float) -> Slow:
    """Return the surrogate plus the KL of each step to the reference policy."""
    loss, means = surrogate(batch, clip_range), batch.reference_means
    assert means is not None
    return lambda theta, row: (
        loss(theta, row)
        + coefficient * reference.gaussian_kl(theta * batch.latents[row].numpy(), means[row].numpy(), STD)
    )


def gated_pull(batch: TransitionBatch, clip_range: float, coefficient: float) -> Slow:
    """Return the surrogate, plus the KL of each step to the reference for rows whose factor is 1."""
    plain, with_kl, factors = surrogate(batch, clip_range), pulled(batch, clip_range, coefficient), batch.kl_weights
    assert factors is not None
    return lambda theta, row: (with_kl if factors[row] else plain)(theta, row)


def denoising(batch: NoisedBatch, weights: list[float]) -> Slow:
    def loss(theta: np.ndarray, row: int) -> float:
        predicted = theta * (batch.clean_latents[row] + batch.noise[row]).numpy()
        return weights[row] * float(((predicted - batch.noise[row].numpy()) ** 2).sum()) / predicted.size

    return loss


def negative_aware(batch: NoisedBatch, beta: float) -> Slow:
    start = Toy().network["theta"].detach().numpy()

    def predicted(theta: np.ndarray, row: int) -> np.ndarray:
        return theta * (batch.clean_latents[row] + batch.noise[row]).numpy()

    def loss(theta: np.ndarray, row: int) -> float:
        old, target = batch.old_predictions[row].numpy(), batch.noise[row].numpy()
        scales = others.negative_aware_scales(predicted(start, row), old, target, beta)
        return others.negative_aware(predicted(theta, row), old, target, WORTH[row], beta, scales)

    return loss


def matching(batch: NoisedBatch, weighting: str, clip_range: float) -> Slow:
    """Return AWM's clipped surrogate of denoising errors. The toy network has noise level 1 everywhere."""

    def log_prob_of(error: float) -> float:
        return -error if weighting == "uniform" else -4 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)

    def loss(theta: np.ndarray, row: int) -> float:
        old, new = log_prob_of(float(batch.old_errors[row])), log_prob_of(error_of(batch, theta, row))
        return reference.clipped_surrogate(new, old, float(batch.weights[row]), clip_range)

    return loss


def error_of(batch: NoisedBatch, theta: np.ndarray, row: int) -> float:
    return denoising(batch, [1.0] * PAIRS)(theta, row)


def preferred(batch: NoisedBatch, beta: float) -> Slow:
    """Return twice DPO's loss of a pair as a function of one row's error, minus the loss itself."""
    start = Toy().network["theta"].detach().numpy()

    def of_pair(errors: list[float], row: int) -> float:
        first = row - row % 2
        margin = sum(
            float(batch.weights[each]) * (errors[each - first] - float(batch.reference_errors[each]))
            for each in (first, first + 1)
        )
        return math.log1p(math.exp(beta / 2 * margin))

    def loss(theta: np.ndarray, row: int) -> float:
        first = row - row % 2
        there = [error_of(batch, start, each) for each in (first, first + 1)]
        here = [error_of(batch, theta, each) if each == row else there[each - first] for each in (first, first + 1)]
        return 2 * of_pair(here, row) - of_pair(there, row)

    return loss


def weighted_in_group(batch: NoisedBatch, beta: float, clip_range: float) -> Slow:
    """Return DGPO's w · A · error, with the weight at the start, and the error too if it is clipped."""
    start = Toy().network["theta"].detach().numpy()

    def loss(theta: np.ndarray, row: int) -> float:
        first, advantage = row - row % 2, float(batch.weights[row])
        moved = [error_of(batch, start, each) - float(batch.reference_errors[each]) for each in (first, first + 1)]
        inside = beta / 2 * sum(float(batch.weights[first + place]) * value for place, value in enumerate(moved))
        ratio = math.exp(float(batch.old_errors[row]) - error_of(batch, start, row))
        clipped = ratio > 1 + clip_range if advantage > 0 else ratio < 1 - clip_range
        error = error_of(batch, start if clipped else theta, row)
        return advantage * error / (1 + math.exp(-inside))

    return loss


FRESH, STALE = [0.0] * PAIRS, [4e-3, -4e-3, 4e-4, -4e-4, 2e-2, -2e-2]
ELEMENTS = 8
PATH, OFF = path_batch(FRESH), path_batch(STALE)
REFERRED = dataclasses.replace(OFF, reference_means=normal(6))
GATED = dataclasses.replace(REFERRED, kl_weights=torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.float64))
# The older policies' means: those of the first three rows are near the current ones, those of the others are not.
FAR = torch.tensor([1e-3, 1e-3, 1e-3, 0.1, 0.1, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
MEANS = Toy().network["theta"].detach() * OFF.latents + FAR * normal(7)
BEYOND = path_batch([-4e-3, 4e-3, 4e-4, 2e-3, 2e-2, -2e-2])  # bad actions that became frequent: beyond the dual clip
BEHIND = dataclasses.replace(OFF, behavior_means=MEANS)
PROXIMAL = dataclasses.replace(OFF, proximal_means=MEANS)
NOISED = noised_batch()
ERRORS = torch.tensor([error_of(NOISED, Toy().network["theta"].detach().numpy(), row) for row in range(PAIRS)])
SIGNED = dataclasses.replace(
    NOISED,
    weights=torch.tensor([1.0, -1.0, 0.5, -0.5, -1.0, 1.0], dtype=torch.float64),
    old_errors=ERRORS.double() + torch.tensor([0.3, 0.02, -0.01, -0.3, 0.0, -0.2]).double(),
    reference_errors=ERRORS.double() + torch.tensor([0.1, -0.2, 0.05, 0.0, -0.1, 0.3]).double(),
    groups=torch.tensor([0, 0, 1, 1, 2, 2]),
)
PAIRED = dataclasses.replace(SIGNED, weights=SIGNED.weights.sign())
CASES: dict[str, tuple[dict[str, Any], TransitionBatch | NoisedBatch, Slow]] = {
    "ddpo_is": ({"name": "ddpo_is", "clip_range": 1e-3}, OFF, surrogate(OFF, 1e-3)),
    "ddpo_is, the default clip": ({"name": "ddpo_is"}, OFF, surrogate(OFF, 1e-4)),
    "ddpo_is, clip in nats": ({"name": "ddpo_is", "clip_nats": 8e-3}, OFF, surrogate(OFF, 8e-3 / ELEMENTS)),
    "ddpo_sf": ({"name": "ddpo_sf"}, PATH, lambda theta, row: -limited(row) * log_prob(theta, PATH, row)),
    "dpok": ({"name": "dpok", "clip_range": 1e-3}, REFERRED, pulled(REFERRED, 1e-3, 0.01 / ELEMENTS)),
    "gardo": ({"name": "gardo", "clip_range": 1e-3}, GATED, gated_pull(GATED, 1e-3, 0.04 / ELEMENTS)),
    "grpo": ({"name": "grpo", "clip_range": 1e-3}, OFF, surrogate(OFF, 1e-3)),
    "grpo, with KL in nats": (
        {"name": "grpo", "clip_range": 1e-3, "kl_coef_nats": 0.02},
        REFERRED,
        pulled(REFERRED, 1e-3, 0.02),
    ),
    "ddpo_is, a range for each side": (
        {"name": "ddpo_is", "clip_range": 1e-3, "clip_range_high": 3e-2},
        OFF,
        bounded(OFF, 1e-3, 3e-2),
    ),
    "grpo, dual clip": (
        {"name": "grpo", "clip_range": 1e-3, "dual_clip": 1.003},
        BEYOND,
        bounded(BEYOND, 1e-3, 1e-3, 1.003),
    ),
    "grpo, a range for each side and dual clip in nats": (
        {"name": "grpo", "clip_nats": 8e-3, "clip_nats_high": 16e-3, "dual_clip_nats": 24e-3},
        BEYOND,
        bounded(BEYOND, 1e-3, 2e-3, 1.003),
    ),
    "grpo_guard": ({"name": "grpo_guard", "clip_range": 1e-4}, BEHIND, guarded(BEHIND, 1e-4)),
    "grpo_guard, to the proximal policy": (
        {"name": "grpo_guard", "clip_range": 1e-2, "off_policy": {"ratio": "proximal"}},
        PROXIMAL,
        guarded(PROXIMAL, 1e-2, proximal=True),
    ),
    "flow_dppo": ({"name": "flow_dppo", "trust_region": 1e-3}, BEHIND, trusted(BEHIND, 1e-3)),
    "flow_dppo, in nats": ({"name": "flow_dppo", "trust_region_nats": 8e-3}, BEHIND, trusted(BEHIND, 1e-3)),
    "flow_dppo, to the proximal policy": (
        {"name": "flow_dppo", "trust_region": 1e-3, "off_policy": {"ratio": "proximal"}},
        PROXIMAL,
        trusted(PROXIMAL, 1e-3, proximal=True),
    ),
    "rwr": ({"name": "rwr"}, NOISED, denoising(NOISED, WORTH)),
    "rwr_sparse": ({"name": "rwr_sparse"}, NOISED, denoising(NOISED, [1.0] * PAIRS)),
    "sft": ({"name": "sft"}, NOISED, denoising(NOISED, [1.0] * PAIRS)),
    "awm": ({"name": "awm", "clip_range": 0.05}, SIGNED, matching(SIGNED, "ghuber", 0.05)),
    "awm, uniform": (
        {"name": "awm", "weighting": "uniform", "clip_range": 0.05},
        SIGNED,
        matching(SIGNED, "uniform", 0.05),
    ),
    "dpo": ({"name": "dpo", "beta": 8.0}, PAIRED, preferred(PAIRED, 8.0)),
    "dgpo": ({"name": "dgpo", "beta": 8.0, "clip_range": 0.05}, SIGNED, weighted_in_group(SIGNED, 8.0, 0.05)),
    "diffusion_nft": ({"name": "diffusion_nft"}, NOISED, negative_aware(NOISED, 1.0)),
    "diffusion_nft, a small beta": ({"name": "diffusion_nft", "beta": 0.1}, NOISED, negative_aware(NOISED, 0.1)),
}


def test_every_registered_algorithm_is_compared_with_a_reference() -> None:
    others = {name for name in ALGORITHMS if build(ALGORITHMS, {"name": name}, "algorithm").restarts_per_image}
    assert {table["name"] for table, _, _ in CASES.values()} == set(ALGORITHMS) - others
    # Those on the reward's gradient have references of their own: test_reward_gradient.py.
    assert others == {"alignprop", "draft", "draft_lv", "refl"}


def slope(loss: Slow, theta: np.ndarray, row: int) -> np.ndarray:
    """Compute central differences, number by number."""
    slopes = np.zeros_like(theta)
    for place in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[place] = 1e-6
        slopes[place] = (loss(theta + step, row) - loss(theta - step, row)) / 2e-6
    return slopes


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_every_transition_are_the_references(case: str) -> None:
    table, batch, slow = CASES[case]
    toy, algorithm = Toy(), build(ALGORITHMS, table, "algorithm")
    theta = toy.network["theta"].detach().numpy().copy()
    losses = algorithm.compute_loss(toy, batch).loss
    for row in range(PAIRS):
        assert losses[row].item() == pytest.approx(slow(theta, row), rel=1e-9, abs=1e-12), row
        (gradient,) = torch.autograd.grad(losses[row], toy.network["theta"], retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), slope(slow, theta, row), rtol=1e-5, atol=1e-8)


def test_clipped_transitions_of_a_stale_batch_have_no_gradient() -> None:
    toy = Toy()
    result = build(ALGORITHMS, {"name": "ddpo_is", "clip_range": 1e-3}, "algorithm").compute_loss(toy, OFF)
    assert result.clipped.tolist() == [1, 1, 0, 0, 1, 1]
    # ratio above the range, good action; below it, bad action: held. The rest is brought back or is within the range.
    held = [row for row in range(PAIRS) if abs(STALE[row]) > 1e-3 and STALE[row] * ADVANTAGES[row] > 0]
    for row in range(PAIRS):
        (gradient,) = torch.autograd.grad(result.loss[row], toy.network["theta"], retain_graph=True)
        assert bool(gradient.any()) == (row not in held), row


def test_step_weights_multiply_the_loss_of_their_transitions() -> None:
    weighted = build(ALGORITHMS, {"name": "ddpo_sf", "step_weights": [1.0, 0.0, 2.5]}, "algorithm")
    plain = build(ALGORITHMS, {"name": "ddpo_sf"}, "algorithm")
    ratio = weighted.compute_loss(Toy(), PATH).loss / plain.compute_loss(Toy(), PATH).loss
    assert ratio.tolist() == pytest.approx([1.0, 0.0, 2.5, 1.0, 0.0, 2.5])


def test_the_kl_that_is_shown_is_in_nats_whatever_scale_its_coefficient_stands_on() -> None:
    expected = [
        reference.gaussian_kl((Toy().network["theta"] * REFERRED.latents[row]).detach().numpy(), mean.numpy(), STD)
        for row, mean in enumerate(REFERRED.reference_means)
    ]
    for keys in ({"kl_coef": 0.04}, {"kl_coef_nats": 0.04}):
        shown = build(ALGORITHMS, {"name": "grpo", **keys}, "algorithm").compute_loss(Toy(), REFERRED).kl_reference
        assert shown.tolist() == pytest.approx(expected, rel=1e-9)
