"""Transition: density by hand and by the slow reference, sampling, and deterministic steps."""

import math

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.transition import Transition
from tests.reference.ddpo_reference import gaussian_log_density


def filled(*values: float) -> torch.Tensor:
    """Return latents [B 1 2 2] with one value per row."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_log_prob_at_the_mean_of_a_standard_normal_is_minus_half_log_two_pi() -> None:
    log_prob = Transition(filled(0.0), torch.tensor([1.0])).log_prob(filled(0.0))
    assert log_prob.tolist() == pytest.approx([-0.9189385])


def test_log_prob_one_deviation_away_by_hand() -> None:
    # z = (5 − 1) / 4 = 1: −1/2 − ln 4 − ln √(2π)
    log_prob = Transition(filled(1.0), torch.tensor([4.0])).log_prob(filled(5.0))
    assert log_prob.tolist() == pytest.approx([-0.5 - 1.3862944 - 0.9189385])


def test_log_prob_is_the_mean_over_latent_elements_and_not_their_sum() -> None:
    next_latents = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2)
    log_prob = Transition(filled(0.0), torch.tensor([1.0])).log_prob(next_latents)
    assert log_prob.tolist() == pytest.approx([-(0 + 1 + 4 + 9) / 2 / 4 - 0.9189385])


def test_log_prob_is_that_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    mean, value = torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator)
    std = torch.tensor([0.03, 0.7, 2.0])
    log_prob = Transition(mean, std).log_prob(value)
    expected = [
        gaussian_log_density(value[row].numpy().astype(np.float64), mean[row].numpy().astype(np.float64), sigma)
        for row, sigma in enumerate(std.double().tolist())
    ]
    assert log_prob.tolist() == pytest.approx(expected, rel=1e-5)


def test_next_latents_stored_in_bfloat16_are_scored_as_they_are_stored() -> None:
    stored = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 1, 2, 2).bfloat16()
    transition = Transition(filled(0.0), torch.tensor([0.1]))
    assert torch.equal(transition.log_prob(stored), transition.log_prob(stored.float()))


def test_sample_is_the_mean_and_each_rows_own_deviation_of_noise() -> None:
    sample = Transition(filled(1.0, 2.0), torch.tensor([0.5, 10.0])).sample(filled(2.0, -1.0))
    assert torch.equal(sample, filled(1.0 + 1.0, 2.0 - 10.0))


def test_a_deterministic_step_gives_its_mean_and_is_no_action() -> None:
    transition = Transition(filled(3.0, 3.0), torch.tensor([0.0, 1.0]))
    assert torch.equal(transition.sample(filled(7.0, 7.0))[0], filled(3.0)[0])
    assert transition.log_prob(filled(3.0, 3.0)).tolist() == pytest.approx([-math.inf, -0.9189385])


def test_the_gradient_by_the_mean_is_the_deviation_over_the_variance() -> None:
    mean = filled(1.0).clone().requires_grad_()
    Transition(mean, torch.tensor([0.5])).log_prob(filled(1.5)).sum().backward()
    assert torch.allclose(mean.grad, torch.full((1, 1, 2, 2), (1.5 - 1.0) / 0.25 / 4))
