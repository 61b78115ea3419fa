"""Off-policy corrections: worked out by hand, and against the slow reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.learner.algorithms.off_policy import (
    decoupled_surrogate,
    drift_nats,
    importance_weight,
    unmasked_mean_factor,
    within_drift,
)
from ray_ddpo.learner.algorithms.policy_gradient import OffPolicySettings
from tests.reference import ddpo_reference as reference


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([math.log(value) for value in values])


@pytest.mark.parametrize(
    ("proximal", "behavior", "weight"),
    [
        (1.2, 1.0, 1.2),  # within a band of ln 1.5
        (3.0, 1.0, 1.5),  # held from above
        (1.0, 3.0, 1 / 1.5),  # held from below
        (2.0, 2.0, 1.0),
    ],
)
def test_the_weight_by_hand(proximal: float, behavior: float, weight: float) -> None:
    assert importance_weight(logs(proximal), logs(behavior), math.log(1.5)).item() == pytest.approx(weight)


@pytest.mark.parametrize(
    ("present", "proximal", "weight", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, 1.0, 2.0, -2.0, -2.0),  # plain PPO before any update
        (1.0, 1.0, 0.5, 2.0, -1.0, -1.0),  # half the weight, half the pull
        (3.0, 2.0, 0.5, 2.0, -1.2, 0.0),  # r = 1.5, held at 1.2: 0.5 · min(1.5 · 2, 1.2 · 2)
        (1.0, 2.0, 0.5, 2.0, -0.5, -0.5),  # r = 0.5: a good action that became rare is brought back
        (3.0, 2.0, 0.5, -2.0, 1.5, 1.5),  # r = 1.5: 0.5 · min(1.5 · −2, 1.2 · −2)
        (1.0, 2.0, 0.5, -2.0, 0.8, 0.0),
    ],
)
def test_the_decoupled_loss_and_its_gradient_by_hand(
    present: float, proximal: float, weight: float, advantage: float, loss: float, gradient: float
) -> None:
    log_prob = logs(present).requires_grad_()
    found = decoupled_surrogate(log_prob, logs(proximal), torch.tensor([weight]), torch.tensor([advantage]), 0.2)
    found.sum().backward()
    assert (found.item(), log_prob.grad.item()) == pytest.approx((loss, gradient), abs=1e-6)


def test_neither_the_weight_nor_the_proximal_policy_has_a_gradient() -> None:
    log_prob, proximal = logs(1.1).requires_grad_(), logs(1.0).requires_grad_()
    weight = importance_weight(proximal, logs(1.05), 0.2)
    decoupled_surrogate(log_prob, proximal, weight, torch.ones(1), 0.2).sum().backward()
    assert not weight.requires_grad and proximal.grad is None and log_prob.grad is not None


QUADRUPLES = st.lists(
    st.tuples(
        st.floats(-4, 4, width=32),
        st.floats(-0.5, 0.5, width=32),
        st.floats(-0.5, 0.5, width=32),
        st.floats(-5, 5, width=32),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(pairs=QUADRUPLES, clip_range=st.floats(1e-5, 0.9), band=st.floats(1e-4, 0.4))
def test_every_pair_has_the_references_loss(
    pairs: list[tuple[float, float, float, float]], clip_range: float, band: float
) -> None:
    behavior, first, second, advantages = (torch.tensor(column) for column in zip(*pairs, strict=True))
    proximal = behavior + first
    log_prob = proximal + second
    weight = importance_weight(proximal, behavior, band)
    losses = decoupled_surrogate(log_prob, proximal, weight, advantages, clip_range)
    triples = zip(log_prob.tolist(), proximal.tolist(), behavior.tolist(), strict=True)
    expected = [
        reference.decoupled_surrogate(triple, advantage, clip_range, band)
        for triple, advantage in zip(triples, advantages.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_drift_by_hand() -> None:
    # two latents of 2 elements: (3² + 4²) / (2 · 0.5²) = 50 nats, and (0 + 1²) / (2 · 2²) = 1/8
    mean = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    behavior = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    std = torch.tensor([0.5, 2.0])
    found = drift_nats(Transition(mean, std), Transition(behavior, std))
    assert found.tolist() == [50.0, 0.125]
    assert within_drift(found, 1.0).tolist() == [0.0, 1.0]
    assert within_drift(found, 50.0).tolist() == [1.0, 1.0]


def test_drift_is_the_references_and_has_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, behavior = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])
    found = drift_nats(Transition(mean.requires_grad_(), std), Transition(behavior, std))
    expected = [
        reference.gaussian_kl(mean[row].detach().numpy(), behavior[row].numpy(), float(std[row])) for row in range(5)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5) and not found.requires_grad


def test_drift_is_what_the_log_ratio_of_many_draws_has_as_its_mean() -> None:
    mean, behavior, std = torch.full((1, 1, 4, 4), 0.3), torch.zeros(1, 1, 4, 4), torch.tensor([0.5])
    sampled = behavior + 0.5 * torch.randn(20_000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    present, sampled = (Transition(value.expand_as(sampled), std.expand(20_000)) for value in (mean, behavior))
    kl = 16 * float((sampled.log_prob(sampled) - present.log_prob(sampled)).mean())
    assert kl == pytest.approx(float(drift_nats(Transition(mean, std), Transition(behavior, std))), rel=0.02)


def test_the_denominator_counts_what_is_left() -> None:
    losses, kept = np.array([6.0, 5.0, 4.0, 3.0]), np.array([1.0, 0.0, 1.0, 0.0])
    assert (losses * kept).sum() / 4 * unmasked_mean_factor(4, 2) == 5.0  # (6 + 4) / 2


def test_a_weight_without_the_proximal_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="importance_weight is 0.001 and ratio 'behavior', which has that weight"):
        OffPolicySettings(importance_weight=1e-3)
