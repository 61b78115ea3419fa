"""The contract of every algorithm in the registry: one loss per transition, independent of the others in the batch."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusionPolicy
from ray_ddpo.common.diffusion.lora.adapters import trained_parameters
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.trajectory import COLUMNS, NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient
from tests.restarts import with_reward
from tests.tiny_policy import SAMPLING, scatter, tiny_policy

pytestmark = pytest.mark.rotated(every=3)

CORRECTED = {"ratio": "proximal", "importance_weight": 1e-3, "max_drift_nats": 1e6}
CHOICES = [
    *({"name": name} for name in ALGORITHMS),
    {"name": "ddpo_is", "off_policy": CORRECTED},
    {"name": "ddpo_is", "clip_nats": 0.1, "step_weights": [1.0, 0.5, 2.0, 1.0]},
    {"name": "grpo", "clip_range": 1e-4, "clip_range_high": 2e-4, "dual_clip": 1.001},
    {"name": "grpo_guard", "off_policy": CORRECTED},
    {"name": "flow_dppo", "off_policy": CORRECTED, "kl_coef": 0.1},
    {"name": "grpo", "step_weights": "noise_level"},
    {"name": "rwr", "over": "prompt"},
    {"name": "awm", "kl_coef": 0.01, "behavior_kl_coef": 1.0},
    {"name": "diffusion_nft", "kl_coef": 0.01},
    {"name": "dgpo", "kl_coef": 0.01},
]
Batch = TransitionBatch | NoisedBatch | RestartBatch


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
        old, target = policy.denoise(clean, noise, timesteps, conditioning)
        rows = trajectory.latents[images, places], trajectory.steps[images, places], conditioning
        means = policy.transition(*rows).mean
    scatter(policy.network, deviation=1e-3, seed=8)
    path = TransitionBatch(
        conditioning,
        trajectory.steps[images, places],
        trajectory.latents[images, places],
        trajectory.next_latents[images, places],
        trajectory.log_probs[images, places],
        torch.tensor([1.5, -1.0, 0.3, -7.0, 0.3, 7.0, -1.0, 1.5]),
        proximal_means=means,
        behavior_means=means,
        reference_means=trajectory.next_latents[images, places],  # any reference means will do
    )
    weights = torch.tensor([1.0, 0.2, 0.6, 0.9, 0.1, 0.3, 0.7, 1.0])
    noises = torch.randn(4, 8, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    texts = ("a cat", "a dog", "a horse", "a cow", "a cow", "a horse", "a dog", "a cat")
    starts, latents = tuple(places.tolist()), trajectory.latents[images, places]
    restarts = RestartBatch(conditioning, starts, latents, dict(enumerate(noises)), texts, ({},) * 8)
    noised = NoisedBatch(
        conditioning,
        timesteps,
        clean,
        noise,
        weights,
        old_predictions=old,
        reference_predictions=0.9 * old,  # any reference will do
        old_errors=(old - target).square().flatten(1).mean(1),
        reference_errors=1.1 * (old - target).square().flatten(1).mean(1),
        coupling=torch.stack([torch.linspace(0.1, 0.8, 8), weights, torch.ones(8), torch.zeros(8)], 1),
    )
    return {"path": path, "noised": noised, "restarts": restarts}


@pytest.fixture(params=CHOICES, ids=lambda table: "-".join([table["name"], *list(table)[1:]]))
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    made = build(ALGORITHMS, request.param, "algorithm")
    return with_reward(made) if isinstance(made, RewardGradient) else made


@pytest.fixture
def batch(algorithm: Algorithm, batches: dict[str, Batch]) -> Batch:
    if algorithm.restarts_per_image:
        return batches["restarts"]
    if algorithm.noised_samples_per_image:
        noised = batches["noised"]
        unasked: dict[str, Any] = {name: None for name in COLUMNS if name not in algorithm.columns}
        known = {name: None for name in unasked if hasattr(noised, name)}
        return dataclasses.replace(noised, **known, **({} if algorithm.compares_groups else {"coupling": None}))
    means = ("proximal_means", "behavior_means", "reference_means")
    return dataclasses.replace(batches["path"], **dict.fromkeys(set(means) - algorithm.columns))


def rows_of(batch: Batch, index: torch.Tensor) -> Batch:
    if isinstance(batch, RestartBatch):
        chosen = {name: tuple(getattr(batch, name)[row] for row in index) for name in ("starts", "prompts", "metadata")}
        conditioning = {name: value[index] for name, value in batch.conditioning.items()}
        noise = {step: value[index] for step, value in batch.noise.items()}
        return dataclasses.replace(
            batch, conditioning=conditioning, noise=noise, latents=batch.latents[index], **chosen
        )
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
    assert (result.log_ratio is not None) == isinstance(batch, TransitionBatch)


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
    if isinstance(batch, RestartBatch):
        return  # its loss reads no advantages
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
        own = dict.fromkeys(("proximal_means", "behavior_means", "reference_means"))
        wanted = dataclasses.replace(wanted, old_log_probs=fresh, **own)
    before = likelihood(policy, wanted, algorithm)
    slopes = gradients(policy, algorithm.compute_loss(policy, wanted).loss)
    parameters = trained_parameters(policy.network)
    length = torch.stack([slopes[name].norm() for name in parameters]).norm()
    step = 2e-3 / float(length)  # the same distance for every algorithm: ReFL's loss is a thousandth of the reward
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.sub_(slopes[name], alpha=step)
        after = likelihood(policy, wanted, algorithm)
        for name, parameter in parameters.items():
            parameter.add_(slopes[name], alpha=step)
    assert after > before


@torch.no_grad()
def likelihood(policy: StableDiffusionPolicy, batch: Batch, algorithm: Algorithm) -> float:
    """Return the log-prob of the sampled steps; for noised images, minus the denoising error; for restarts, the reward."""
    if isinstance(batch, RestartBatch):
        return float(algorithm.compute_loss(policy, batch).reward.double().sum())
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
