"""DiffusionNFT against its authors' formula in float64, on tiny models of diffusers' own classes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.lora.adapters import reference_policy, trained_parameters
from ray_ddpo.common.diffusion.policy import Policy, select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.diffusion_nft import DiffusionNFT
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions
from tests.accepted_page import assert_accepted
from tests.gradients import relative_error
from tests.tiny_families import policy_table, save_tiny_flux, save_tiny_sd3
from tests.tiny_policy import scatter, tiny_policy

WORTH = [1.0, 0.0, 0.25, 0.7]
PLACES = [5, 200, 600, 995]  # of the model's own timesteps: the first has a σ of about 0.02


def authors_loss(
    predicted: Tensor, old: Tensor, reference: Tensor, clean: tuple[Tensor, Tensor, Tensor], beta: float, kl: float
) -> Tensor:
    """Return the loss of each image as in NVlabs/DiffusionNFT's train_nft_sd3.py, for an advantage clip of 5."""
    x0, noise, t = clean
    t = t.view(-1, *[1] * (x0.ndim - 1))
    r = torch.tensor(WORTH, dtype=torch.float64)
    dims = tuple(range(1, x0.ndim))
    xt = (1 - t) * x0 + t * noise
    loss = torch.zeros(len(x0), dtype=torch.float64)
    for share, branch in (
        (r, beta * predicted + (1 - beta) * old),
        (1 - r, (1 + beta) * old - beta * predicted),
    ):
        x0_prediction = xt - t * branch
        weight = (x0_prediction - x0).detach().abs().mean(dim=dims, keepdim=True).clip(min=0.00001)
        loss = loss + share * ((x0_prediction - x0) ** 2 / weight).mean(dim=dims) / beta
    return loss * 5 + kl * ((predicted - reference) ** 2).mean(dim=dims)


def noised_batch(policy: Policy) -> NoisedBatch:
    conditioning = policy.encode(["a cat", "a dog"])
    clean, noise = torch.randn(2, 4, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    rows = select_rows(conditioning, torch.tensor([0, 1, 1, 0]))
    batch = NoisedBatch(rows, torch.tensor(PLACES), clean, noise, torch.tensor(WORTH))
    with torch.no_grad():
        with reference_policy(policy.network):
            pretrained = _predicted(policy, batch)
        old = _predicted(policy, batch)
    scatter(policy.network, deviation=0.02, seed=4)
    return dataclasses.replace(batch, old_predictions=old, reference_predictions=pretrained)


def _predicted(policy: Policy, batch: NoisedBatch) -> Tensor:
    return policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)[0]


def gradient(policy: Policy, loss: Tensor) -> dict[str, np.ndarray]:
    policy.network.zero_grad()
    loss.sum().backward()
    return {name: each.grad.double().numpy().copy() for name, each in trained_parameters(policy.network).items()}


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("make", [save_tiny_sd3, save_tiny_flux], ids=["sd3", "flux"])
def test_loss_and_gradient_are_the_authors_on_flow_models(
    make: Callable[[Path], Path], beta: float, tmp_path: Path
) -> None:
    assert_accepted("DiffusionNFT on a flow model")
    name = make.__name__.removeprefix("save_tiny_")
    config = build(POLICIES, policy_table(name, make(tmp_path)), "policy")
    policy = config.load("cpu", SamplingTable(num_steps=4, guidance_scale=1.0), "sampler")
    scatter(policy.network)
    batch = noised_batch(policy)
    algorithm = build(ALGORITHMS, {"name": "diffusion_nft", "beta": beta, "kl_coef": 1e-2}, "algorithm")
    ours = algorithm.compute_loss(policy, batch)
    sigmas = policy.steps.training_sigmas[batch.timesteps]
    assert 0 < float(sigmas[0]) < 0.05
    old, pretrained = batch.old_predictions.double(), batch.reference_predictions.double()
    clean = batch.clean_latents.double(), batch.noise.double(), sigmas.double()
    theirs = authors_loss(_predicted(policy, batch).double(), old, pretrained, clean, beta, 1e-2)
    np.testing.assert_allclose(ours.loss.detach().numpy(), theirs.detach().numpy(), rtol=1e-6)
    error = relative_error(gradient(policy, ours.loss), gradient(policy, theirs))
    print(f"{name}, beta {beta}: relative error of the gradient {error:.1e}")
    assert error < 1e-6
    assert set(ours.terms) == {"positive", "negative", "kl"}


def test_on_a_unet_errors_are_measured_in_what_it_predicts(tiny_model: Path) -> None:
    assert_accepted("DiffusionNFT on a UNet")
    policy = tiny_policy(tiny_model)
    batch = dataclasses.replace(noised_batch(policy), reference_predictions=None)
    loss = DiffusionNFT().compute_loss(policy, batch).loss.detach()
    with torch.no_grad():
        predicted, target = policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)
    expected = []
    for share, old, prediction, wanted in zip(WORTH, batch.old_predictions, predicted, target, strict=True):
        branches = ((share, prediction), (1 - share, 2 * old - prediction))
        errors = [(part, (branch - wanted).double()) for part, branch in branches]
        expected.append(5 * sum(part * float((each**2).mean() / each.abs().mean()) for part, each in errors))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_default_advantages_are_the_authors() -> None:
    """Advantages are (reward − mean of the prompt's images) / std of the round (PerPromptStatTracker)."""
    rewards, prompts = np.array([1.0, 4.0, 2.0, 2.5, -3.0, 0.5]), ["a", "a", "b", "b", "c", "c"]
    algorithm = DiffusionNFT()
    found = algorithm.from_advantages(algorithm.compute_advantages({}, prompts, rewards, 2)[1])
    means = np.repeat(rewards.reshape(3, 2).mean(1), 2)
    advantages = (rewards - means) / (rewards.std() + 1e-4)
    np.testing.assert_allclose(found, np.clip(advantages / 5 / 2 + 0.5, 0, 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.3, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.3, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_advantage_modes_are_the_authors(mode: str, expected: list[float]) -> None:
    """Check r of `adv_mode` in NVlabs/DiffusionNFT's train_nft_sd3.py, for adv_clip_max 5."""
    found = DiffusionNFT(advantage_mode=mode).from_advantages(np.array([-7.0, -2.0, 0.0, 1.0, 9.0]))
    assert found.tolist() == pytest.approx(expected)


def authors_decay(step: int, decay_type: int) -> float:
    """Compute `return_decay` of train_nft_sd3.py."""
    flat, rate, hold = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}[decay_type]
    return 0.0 if step < flat else min((step - flat) * rate, hold)


@pytest.mark.parametrize(
    ("decay_type", "keys"),
    [
        (0, {"ema_decay_growth": 0.0}),
        (1, {}),
        (2, {"ema_decay_flat": 75, "ema_decay_growth": 0.0075, "ema_decay_max": 0.999}),
    ],
)
def test_decays_of_the_moving_average_are_the_authors(decay_type: int, keys: dict[str, float]) -> None:
    algorithm = DiffusionNFT(**keys)
    for version in (0, 1, 74, 75, 76, 200, 208, 209, 499, 500, 501, 5000):
        assert (algorithm.ema_decay(version) or 0.0) == pytest.approx(authors_decay(version, decay_type))


def test_shared_noise_cancels_in_the_gradient_of_a_group() -> None:
    """Images that are alike give a gradient with the same mean and less variance, as measured over draws of noise."""
    sampling = SamplingTable(num_steps=8, guidance_scale=1.0)
    config = build(POLICIES, {"name": "sd3", "model": "tiny_words", "t5": False, "max_sequence_length": 1}, "policy")
    policy = config.load("cpu", sampling, "sampler")
    images = sample_trajectories(policy, ['a sign that says "CAT"'] * 4, [1, 2, 3, 4], sampling)
    transitions = round_transitions((images,), np.array([0.6, 0.4, 0.45, 0.55]), "cpu")
    draws: dict[int, np.ndarray] = {}
    for sharing in (1, 4):
        samples = NoisedSamples(transitions, (1, 2, 3, 4), 1, policy.num_train_timesteps, sharing)
        steps = [samples.batch(indices_of(torch.arange(4), range(draw, draw + 1))) for draw in range(12)]
        gradients = [gradient(policy, DiffusionNFT().compute_loss(policy, step).loss) for step in steps]
        draws[sharing] = np.stack([np.concatenate([part.ravel() for part in each.values()]) for each in gradients])
    own, shared = (float(each.var(axis=0).sum()) for each in draws.values())
    apart = float(np.square(draws[1].mean(axis=0) - draws[4].mean(axis=0)).sum())
    print(f"variance of the gradient: {own:.2e} with noise of each image, {shared:.2e} with shared noise, {apart:.1e}")
    assert shared < own / 2
    assert apart < 3 * (own + shared) / 12
