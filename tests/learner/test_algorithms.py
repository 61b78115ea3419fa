"""Every algorithm's loss and gradient in float64, on eight numbers: against slow references and finite differences."""

import dataclasses
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

STD = 0.5
PAIRS, SHAPE = 6, (2, 2, 2)
STEPS = [0, 1, 2, 0, 1, 2]
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
    """Pairs whose policy has moved: their old log-prob lies `shifts` below what the present weights give."""
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


def pulled(batch: TransitionBatch, clip_range: float, coefficient: float) -> Slow:
    """The surrogate, and the KL of each step to the reference policy."""
    loss, means = surrogate(batch, clip_range), batch.reference_means
    assert means is not None
    return lambda theta, row: (
        loss(theta, row)
        + coefficient * reference.gaussian_kl(theta * batch.latents[row].numpy(), means[row].numpy(), STD)
    )


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


FRESH, STALE = [0.0] * PAIRS, [4e-3, -4e-3, 4e-4, -4e-4, 2e-2, -2e-2]
ELEMENTS = 8
PATH, OFF = path_batch(FRESH), path_batch(STALE)
REFERRED = dataclasses.replace(OFF, reference_means=normal(6))
NOISED = noised_batch()
CASES: dict[str, tuple[dict[str, Any], TransitionBatch | NoisedBatch, Slow]] = {
    "ddpo_is": ({"name": "ddpo_is", "clip_range": 1e-3}, OFF, surrogate(OFF, 1e-3)),
    "ddpo_is, the default clip": ({"name": "ddpo_is"}, OFF, surrogate(OFF, 1e-4)),
    "ddpo_is, clip in nats": ({"name": "ddpo_is", "clip_nats": 8e-3}, OFF, surrogate(OFF, 8e-3 / ELEMENTS)),
    "ddpo_sf": ({"name": "ddpo_sf"}, PATH, lambda theta, row: -limited(row) * log_prob(theta, PATH, row)),
    "dpok": ({"name": "dpok", "clip_range": 1e-3}, REFERRED, pulled(REFERRED, 1e-3, 0.01 / ELEMENTS)),
    "grpo": ({"name": "grpo", "clip_range": 1e-3}, OFF, surrogate(OFF, 1e-3)),
    "grpo, with KL in nats": (
        {"name": "grpo", "clip_range": 1e-3, "kl_coef_nats": 0.02},
        REFERRED,
        pulled(REFERRED, 1e-3, 0.02),
    ),
    "rwr": ({"name": "rwr"}, NOISED, denoising(NOISED, WORTH)),
    "rwr_sparse": ({"name": "rwr_sparse"}, NOISED, denoising(NOISED, [1.0] * PAIRS)),
    "diffusion_nft": ({"name": "diffusion_nft"}, NOISED, negative_aware(NOISED, 1.0)),
    "diffusion_nft, a small beta": ({"name": "diffusion_nft", "beta": 0.1}, NOISED, negative_aware(NOISED, 0.1)),
}


def test_every_algorithm_of_the_room_is_held_against_a_reference() -> None:
    assert {table["name"] for table, _, _ in CASES.values()} == set(ALGORITHMS)


def slope(loss: Slow, theta: np.ndarray, row: int) -> np.ndarray:
    """Central differences, number by number."""
    slopes = np.zeros_like(theta)
    for place in np.ndindex(theta.shape):
        step = np.zeros_like(theta)
        step[place] = 1e-6
        slopes[place] = (loss(theta + step, row) - loss(theta - step, row)) / 2e-6
    return slopes


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_every_pair_are_the_references(case: str) -> None:
    table, batch, slow = CASES[case]
    toy, algorithm = Toy(), build(ALGORITHMS, table, "algorithm")
    theta = toy.network["theta"].detach().numpy().copy()
    losses = algorithm.compute_loss(toy, batch).loss
    for row in range(PAIRS):
        assert losses[row].item() == pytest.approx(slow(theta, row), rel=1e-9, abs=1e-12), row
        (gradient,) = torch.autograd.grad(losses[row], toy.network["theta"], retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), slope(slow, theta, row), rtol=1e-5, atol=1e-8)


def test_a_stale_batch_has_clipped_pairs_on_both_sides_and_they_have_no_gradient() -> None:
    toy = Toy()
    result = build(ALGORITHMS, {"name": "ddpo_is", "clip_range": 1e-3}, "algorithm").compute_loss(toy, OFF)
    assert result.clipped.tolist() == [1, 1, 0, 0, 1, 1]
    # ratio above the range, good action; below it, bad action: held. The rest is brought back or is within the range.
    held = [row for row in range(PAIRS) if abs(STALE[row]) > 1e-3 and STALE[row] * ADVANTAGES[row] > 0]
    for row in range(PAIRS):
        (gradient,) = torch.autograd.grad(result.loss[row], toy.network["theta"], retain_graph=True)
        assert bool(gradient.any()) == (row not in held), row


def test_weights_of_steps_multiply_what_their_pairs_teach() -> None:
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
