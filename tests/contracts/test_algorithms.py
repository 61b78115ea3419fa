"""The contract of every algorithm in the registry: one loss per transition, independent of the others in the batch."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusionPolicy
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from tests.tiny_policy import SAMPLING, scatter, tiny_policy

CORRECTED = {"ratio": "proximal", "importance_weight": 1e-3, "max_drift_nats": 1e6}
CHOICES = [
    *({"name": name} for name in ALGORITHMS),
    {"name": "ddpo_is", "off_policy": CORRECTED},
    {"name": "ddpo_is", "clip_nats": 0.1, "step_weights": [1.0, 0.5, 2.0, 1.0]},
    {"name": "rwr", "over": "prompt"},
]
Batch = TransitionBatch | NoisedBatch


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> StableDiffusionPolicy:
    return tiny_policy(tiny_model)


@pytest.fixture(scope="module")
def batches(policy: StableDiffusionPolicy) -> dict[str, Batch]:
    """Return eight transitions of four images, sampled before a small update, and noised samples at mixed timesteps."""
    trajectory = sample_trajectories(policy, ["a cat", "a dog", "a cat", "a cow"], [1, 2, 3, 4], SAMPLING)
    images, places = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    conditioning = select_rows(trajectory.conditioning, trajectory.prompt_index[images])
    clean, noise = trajectory.final_latents[images], torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([20, 900, 500, 300, 700, 100, 990, 600])
    with torch.no_grad():
        old = policy.denoise(clean, noise, timesteps, conditioning)[0]
    scatter(policy.network, deviation=1e-3, seed=8)
    path = TransitionBatch(
        conditioning,
        trajectory.steps[images, places],
        trajectory.latents[images, places],
        trajectory.next_latents[images, places],
        trajectory.log_probs[images, places],
        torch.tensor([1.5, -1.0, 0.3, -7.0, 0.3, 7.0, -1.0, 1.5]),
        reference_means=trajectory.next_latents[images, places],  # any reference means will do
    )
    weights = torch.tensor([1.0, 0.2, 0.6, 0.9, 0.1, 0.3, 0.7, 1.0])
    return {"path": path, "noised": NoisedBatch(conditioning, timesteps, clean, noise, weights, old)}


@pytest.fixture(params=CHOICES, ids=lambda table: "-".join([table["name"], *list(table)[1:]]))
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    return build(ALGORITHMS, request.param, "algorithm")


@pytest.fixture
def batch(algorithm: Algorithm, batches: dict[str, Batch]) -> Batch:
    if algorithm.noised_samples_per_image:
        return batches["noised"]
    path = batches["path"]
    return path if "reference_means" in algorithm.columns else dataclasses.replace(path, reference_means=None)


def rows_of(batch: Batch, index: torch.Tensor) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    conditioning = {name: value[index] for name, value in tensors.pop("conditioning").items()}
    rows = {name: value[index] for name, value in tensors.items() if value is not None}
    return type(batch)(conditioning, **rows)


def seen(result: TransitionLoss) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "terms"}
    return {name: value for name, value in values.items() if value is not None}


def joined(results: list[TransitionLoss]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([seen(result)[name].detach() for result in results]) for name in seen(results[0])}


def gradients(policy: StableDiffusionPolicy, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    policy.network.zero_grad(set_to_none=True)
    loss.sum().backward()
    return {name: parameter.grad for name, parameter in policy.network.named_parameters()}


def test_every_transition_has_one_finite_loss(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    result = algorithm.compute_loss(policy, batch)
    for values in seen(result).values():
        assert values.shape == (8,) and values.isfinite().all()
    assert result.loss.unique().numel() > 1
    torch.testing.assert_close(torch.stack(list(result.terms.values())).sum(0), result.loss)
    assert result.clipped is None or set(result.clipped.tolist()) <= {0.0, 1.0}
    assert (result.log_ratio is None) == isinstance(batch, NoisedBatch)


def test_only_the_loss_has_a_gradient_and_it_reaches_every_adapter_and_nothing_else(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    result = algorithm.compute_loss(policy, batch)
    assert [name for name, value in seen(result).items() if value.requires_grad] == ["loss"]
    trained = trained_parameters(policy.network)
    for name, gradient in gradients(policy, result.loss).items():
        assert (gradient is not None) == (name in trained), name
        assert gradient is None or gradient.abs().max() > 0, name


def test_splitting_a_micro_batch_changes_no_value(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    whole = joined([algorithm.compute_loss(policy, batch)])
    halves = [algorithm.compute_loss(policy, rows_of(batch, part)) for part in torch.arange(8).split(4)]
    for name, values in joined(halves).items():
        torch.testing.assert_close(values, whole[name], rtol=5e-6, atol=5e-6)


def test_reordered_transitions_have_reordered_values(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    there = joined([algorithm.compute_loss(policy, batch)])
    permuted = joined([algorithm.compute_loss(policy, rows_of(batch, order))])
    for name, values in permuted.items():
        torch.testing.assert_close(values, there[name][order], rtol=5e-6, atol=5e-6)


def test_images_without_an_advantage_teach_nothing(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    """Check that no advantage gives no gradient. Weights and r are only ever relative, and so are not checked here."""
    if isinstance(batch, NoisedBatch):
        assert algorithm.compute_advantages({}, ["a cat"] * 4, np.ones(4), 4)[1].std() == 0
        return
    worthless = dataclasses.replace(batch, advantages=torch.zeros(8), reference_means=None)
    result = algorithm.compute_loss(policy, worthless)
    assert all(gradient is None or not gradient.any() for gradient in gradients(policy, result.loss).values())


def test_a_better_image_becomes_more_likely_by_a_small_step_down_the_loss(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: Batch
) -> None:
    # The first and last transitions belong to the image with the largest advantage; the others are masked.
    wanted = rows_of(batch, torch.tensor([0, 7]))
    if isinstance(wanted, TransitionBatch):  # on the policy's own data, and without a pull elsewhere
        fresh = wanted.old_log_probs + algorithm.compute_loss(policy, wanted).log_ratio
        wanted = dataclasses.replace(wanted, old_log_probs=fresh, reference_means=None)
    before = likelihood(policy, wanted)
    slopes = gradients(policy, algorithm.compute_loss(policy, wanted).loss)
    parameters = trained_parameters(policy.network)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.sub_(slopes[name], alpha=1e-3)
        after = likelihood(policy, wanted)
        for name, parameter in parameters.items():
            parameter.add_(slopes[name], alpha=1e-3)
    assert after > before


@torch.no_grad()
def likelihood(policy: StableDiffusionPolicy, batch: Batch) -> float:
    """Return the log-prob of the sampled steps; for noised images, minus the denoising error."""
    if isinstance(batch, TransitionBatch):
        transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
        return float(transition.log_prob(batch.next_latents).double().sum())
    predicted, target = policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)
    return -float((predicted - target).double().square().sum())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_follow_their_images_and_grow_with_the_reward(name: str) -> None:
    algorithm = build(ALGORITHMS, {"name": name}, "algorithm")
    rewards = np.random.default_rng(1).normal(size=12)
    groups = [f"animal {image // 4}" for image in range(12)]
    _, found = algorithm.compute_advantages({}, groups, rewards, 4)
    assert found.shape == (12,) and np.isfinite(found).all()
    swapped = [*range(4, 8), *range(0, 4), *range(8, 12)]  # whole groups change places
    _, elsewhere = algorithm.compute_advantages({}, [groups[image] for image in swapped], rewards[swapped], 4)
    np.testing.assert_allclose(elsewhere, found[swapped], rtol=1e-9)
    for group in range(3):
        images = np.arange(4 * group, 4 * group + 4)
        assert (np.diff(found[images[np.argsort(rewards[images])]]) >= 0).all()
