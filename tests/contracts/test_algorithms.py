"""What every algorithm promises, for each in its room: one loss a pair, whatever stands beside it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from common.diffusion.lora import trained_parameters
from common.diffusion.policy import select_rows
from common.diffusion.policy_stable_diffusion import StableDiffusionPolicy
from common.diffusion.rollout import draw
from common.registry import build
from common.trajectory import TransitionBatch
from learner.algorithms import ALGORITHMS
from learner.algorithms.algorithm import Algorithm, PairLoss
from tests.tiny_policy import SAMPLING, scatter, tiny_policy


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> StableDiffusionPolicy:
    return tiny_policy(tiny_model)


@pytest.fixture(scope="module")
def batch(policy: StableDiffusionPolicy) -> TransitionBatch:
    """Eight pairs of four images at mixed steps, drawn before the policy moved a little."""
    trajectory = draw(policy, ["a cat", "a dog", "a cat", "a cow"], [1, 2, 3, 4], SAMPLING)
    scatter(policy.network, deviation=1e-3, seed=8)
    images, places = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    return TransitionBatch(
        select_rows(trajectory.conditioning, trajectory.prompt_index[images]),
        trajectory.steps[images, places],
        trajectory.latents[images, places],
        trajectory.next_latents[images, places],
        trajectory.log_probs[images, places],
        torch.tensor([1.5, -1.0, 0.3, -7.0, 0.3, 7.0, -1.0, 1.5]),
        trajectory.final_latents[images],
    )


CORRECTED = {"ratio": "proximal", "behaviour_weight": 1e-3, "max_drift_nats": 1e6}
CHOICES = [*({"name": name} for name in ALGORITHMS), {"name": "ddpo_is", "off_policy": CORRECTED}]


@pytest.fixture(params=CHOICES, ids=lambda table: "-".join(["corrected"][: len(table) - 1] + [table["name"]]))
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    return build(ALGORITHMS, request.param, "algorithm")


def rows_of(batch: TransitionBatch, index: torch.Tensor) -> TransitionBatch:
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    conditioning = {name: value[index] for name, value in tensors.pop("conditioning").items()}
    rows = {name: value[index] for name, value in tensors.items() if value is not None}
    return TransitionBatch(conditioning, **rows)


def joined(results: list[PairLoss]) -> dict[str, torch.Tensor]:
    names = ("loss", "log_ratio", "clipped")
    return {name: torch.cat([getattr(result, name).detach() for result in results]) for name in names}


def gradients(policy: StableDiffusionPolicy, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    policy.network.zero_grad(set_to_none=True)
    loss.sum().backward()
    return {name: parameter.grad for name, parameter in policy.network.named_parameters()}


def test_every_pair_has_one_finite_loss(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    result = algorithm.pair_loss(policy, batch)
    for values in (result.loss, result.log_ratio, result.clipped):
        assert values.shape == (8,) and values.isfinite().all()
    assert result.loss.unique().numel() > 1
    assert set(result.clipped.tolist()) <= {0.0, 1.0}


def test_only_the_loss_has_a_gradient_and_it_reaches_every_adapter_and_nothing_else(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    result = algorithm.pair_loss(policy, batch)
    assert not result.log_ratio.requires_grad and not result.clipped.requires_grad
    trained = trained_parameters(policy.network)
    for name, gradient in gradients(policy, result.loss).items():
        assert (gradient is not None) == (name in trained), name
        assert gradient is None or gradient.abs().max() > 0, name


def test_splitting_a_micro_batch_changes_no_value(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    whole = joined([algorithm.pair_loss(policy, batch)])
    halves = [algorithm.pair_loss(policy, rows_of(batch, part)) for part in torch.arange(8).split(4)]
    for name, values in joined(halves).items():
        torch.testing.assert_close(values, whole[name], rtol=2e-6, atol=2e-6)


def test_pairs_in_another_order_have_their_values_in_that_order(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    there = joined([algorithm.pair_loss(policy, batch)])
    permuted = joined([algorithm.pair_loss(policy, rows_of(batch, order))])
    for name, values in permuted.items():
        torch.testing.assert_close(values, there[name][order], rtol=2e-6, atol=2e-6)


def test_images_that_are_worth_no_more_than_others_teach_nothing(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    worthless = dataclasses.replace(batch, advantages=torch.zeros(8))
    result = algorithm.pair_loss(policy, worthless)
    assert all(gradient is None or not gradient.any() for gradient in gradients(policy, result.loss).values())


def test_a_better_image_becomes_more_likely_by_a_small_step_down_the_loss(
    algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch
) -> None:
    # The first and the last pair are one image's, whose advantage is positive; the others are worth nothing.
    wanted = rows_of(batch, torch.tensor([0, 7]))
    fresh = dataclasses.replace(wanted, old_log_probs=wanted.old_log_probs + log_ratio_of(algorithm, policy, wanted))
    slopes = gradients(policy, algorithm.pair_loss(policy, fresh).loss)
    parameters = trained_parameters(policy.network)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.sub_(slopes[name], alpha=1e-3)
        after = log_ratio_of(algorithm, policy, fresh)
        for name, parameter in parameters.items():
            parameter.add_(slopes[name], alpha=1e-3)
    assert float(after.sum()) > 0


def log_ratio_of(algorithm: Algorithm, policy: StableDiffusionPolicy, batch: TransitionBatch) -> torch.Tensor:
    return algorithm.pair_loss(policy, batch).log_ratio
