"""Weights by noise level: TempFlow-GRPO's constant, the loss by hand, and refused policies."""

import re
from pathlib import Path

import pytest
import torch

from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.diffusion.schedulers.flow_match import flow_match_table
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.step_weights import noise_level_weights, weights_of_steps
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions
from tests.learner.test_algorithms import Toy
from tests.tiny_policy import SAMPLING, scatter, tiny_policy


def test_weights_are_tempflow_grpos() -> None:
    """Its loss is 2.25 · std · …, with SD3.5's 10 steps at level 0.7 (scripts/train_sd3_pr.py of TempFlow-GRPO)."""
    std = flow_match_table({"shift": 3.0}, 10, 0.7, 1024, False).std()
    found = noise_level_weights(std)
    torch.testing.assert_close(found, 2.25 * std, rtol=2e-3, atol=0)
    assert float(found[:-1].mean()) == pytest.approx(1, rel=1e-6) and found[-1] == 0


def test_weights_are_by_hand() -> None:
    assert noise_level_weights(torch.tensor([1.0, 0.0, 3.0, 2.0])).tolist() == [0.5, 0.0, 1.5, 1.0]


@pytest.mark.parametrize("name", ["ddpo_sf", "grpo"])
def test_a_transitions_loss_is_multiplied_by_its_steps_weight(name: str, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    sampled = sample_trajectories(policy, ["a cat", "a dog"], [1, 2], SAMPLING)
    rows = round_transitions((sampled,), torch.tensor([1.5, -0.5]).numpy(), "cpu")
    batch = rows.batch(indices_of(torch.arange(2), range(sampled.steps.shape[1])))
    scatter(policy.network, deviation=1e-3, seed=4)
    plain, weighted = (
        build(ALGORITHMS, {"name": name, **keys}, "algorithm").compute_loss(policy, batch).loss
        for keys in ({}, {"step_weights": "noise_level"})
    )
    expected = policy.steps.std() / policy.steps.std()[policy.stochastic_steps].mean()
    torch.testing.assert_close(weighted, plain * expected[batch.steps])
    assert not torch.allclose(weighted, plain)


def test_a_policy_without_a_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape('step_weights is "noise_level", and Toy has no DenoisingSteps')):
        weights_of_steps("noise_level", Toy(), "cpu")
    assert weights_of_steps((), Toy(), "cpu") is None


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="step_weights"):
        build(ALGORITHMS, {"name": "grpo", "step_weights": "sigma"}, "algorithm")
