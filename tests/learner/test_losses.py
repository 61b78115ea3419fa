"""The clipped surrogate: worked out by hand for both signs and both sides of the clip, and against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ddpo.learner.algorithms.losses import clipped_surrogate
from tests.reference import ddpo_reference as reference


def loss_of(ratio: float, advantage: float) -> tuple[float, float]:
    """Return the loss at clip_range 0.2, and its gradient by log_prob."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    return loss.item(), log_prob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # before any update: minus the advantage
        (1.5, 2.0, -2.4, 0.0),  # min(1.5 · 2, 1.2 · 2): no more to gain from a good action
        (0.5, 2.0, -1.0, -1.0),  # min(0.5 · 2, 0.8 · 2): a good action that became rare is brought back
        (0.5, -2.0, 1.6, 0.0),  # min(0.5 · −2, 0.8 · −2): no more to gain from avoiding a bad one
        (1.5, -2.0, 3.0, 3.0),  # min(1.5 · −2, 1.2 · −2): a bad action that became frequent is pushed back
        (1.1, 2.0, -2.2, -2.2),  # within the range nothing is held
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_loss_and_gradient_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-6)


PAIRS = st.lists(
    st.tuples(st.floats(-4, 4, width=32), st.floats(-0.5, 0.5, width=32), st.floats(-5, 5, width=32)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, clip_range=st.floats(1e-5, 0.9))
def test_every_transition_has_the_references_loss(pairs: list[tuple[float, float, float]], clip_range: float) -> None:
    old, shift, advantages = (torch.tensor(column) for column in zip(*pairs, strict=True))
    log_prob = old + shift
    losses = clipped_surrogate(log_prob, old, advantages, clip_range)
    triples = zip(log_prob.tolist(), old.tolist(), advantages.tolist(), strict=True)
    expected = [reference.clipped_surrogate(*triple, clip_range) for triple in triples]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
