"""DPOK's value function: its network against the authors' formula, what it learns, and exact resumes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.algorithms.value_settings import ValueSettings
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.learner.round_data.transitions import round_transitions
from ray_ddpo.learner.value_function import ValueFunction, ValueNetwork, prompt_features
from ray_ddpo.train import run_training
from tests.rounds import components_with, learner_of, sample_round
from tests.tiny_families import policy_table, save_tiny_flux

VALUE = {"algorithm": {"name": "dpok", "value": {"steps": 3, "batch_size": 16, "learning_rate": 1e-2}}}


def test_the_network_is_the_authors_value_multi() -> None:
    """relu(γ₁(t) (W₁ [x, c] + b₁)), twice more, and a linear output (google-research/dpok, reward_model.py)."""
    torch.manual_seed(0)
    network, inputs, steps = ValueNetwork(6, 4).double(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 1])
    weights = dict(network.named_parameters())
    expected = inputs
    for number in range(3):
        linear = expected @ weights[f"layers.{number}.linear.weight"].T + weights[f"layers.{number}.linear.bias"]
        expected = F.relu(weights[f"layers.{number}.factors.weight"][steps] * linear)
    expected = (expected @ weights["value.weight"].T + weights["value.bias"])[:, 0]
    torch.testing.assert_close(network(inputs, steps), expected)
    assert [tuple(weights[f"layers.{number}.linear.weight"].shape) for number in range(3)] == [
        (256, 6),
        (256, 256),
        (256, 256),
    ]


def test_the_prompt_is_the_mean_of_positive_conditioning_at_one_scale() -> None:
    tokens = torch.tensor([[[3.0, 0.0], [3.0, 8.0]], [[0.0, 1.0], [0.0, 1.0]]])  # means (3, 4) and (0, 1)
    rows = {"prompt": tokens, "negative_prompt": torch.ones(1, 2, 2), "label": torch.tensor([3, 4])}
    found = prompt_features(rows)
    norm = np.sqrt(12.5)  # root mean square of (3, 4)
    expected = torch.tensor([[3, 3 / norm, 4 / norm], [4, 0, np.sqrt(2)]], dtype=torch.float32)
    torch.testing.assert_close(found, expected)


def test_values_learn_what_depends_on_prompt_and_step(tables: dict) -> None:
    components = components_with(tables)
    sampled = sample_round(components, learner_of(components).weights()[-1])
    prompts = [prompt.text for report in sampled.batch.reports for prompt in report.task.prompts]
    assert len(set(prompts)) > 1
    advantages = np.array([float(len(prompt)) for prompt in prompts]) - 5
    transitions = round_transitions(sampled.trajectories, advantages, "cpu")
    value = ValueFunction(ValueSettings(learning_rate=1e-3, steps=60, batch_size=32), 4, seed=0, device="cpu")
    before, _ = ValueFunction(ValueSettings(steps=1, learning_rate=1e-9), 4, 0, "cpu").learn(
        transitions, torch.arange(8), (0, 0)
    )
    values, metrics = value.learn(transitions, torch.arange(8), (0, 0))
    target = torch.tensor(advantages)[:, None]
    assert (values - target).square().mean() < 0.2 * (before - target).square().mean()
    assert metrics["value/explained_variance"] > 0.5 and metrics["value/loss"] > 0


def test_the_learner_subtracts_values_of_each_transition_and_leaves_dropped_images_out(tables: dict) -> None:
    components = components_with({**tables, **VALUE})
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    advantages = sampled.batch.advantages.copy()
    advantages[[2, 3]] = np.nan
    batch = dataclasses.replace(sampled.batch, advantages=advantages, dropped=(2, 3))
    transitions = round_transitions(sampled.trajectories, batch.advantages, "cpu")
    with_values = learner._companions.with_baselines(batch, transitions)
    indices = torch.tensor([[0, 1], [5, 3], [7, 0]])
    found, plain = with_values.batch(indices).advantages, transitions.batch(indices).advantages
    torch.testing.assert_close(found, plain - with_values.baselines[indices[:, 0], indices[:, 1]])
    values = with_values.baselines[[0, 1, 4, 5, 6, 7]]
    assert values.isfinite().all() and (values.std(1) > 0).all(), "each transition has its own"
    metrics, state = learner.update(batch, *sampled.trajectories)
    assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["value/loss"]) and state.value
    other = learner_of(components_with({**tables, "algorithm": {"name": "dpok"}}))
    assert other.update(batch, *sampled.trajectories)[1].trained.fingerprint != state.trained.fingerprint


def test_the_values_are_learned_from_the_images_that_are_trained_on(tables: dict) -> None:
    """An image that is not selected has 0 in the place of its advantage, which is nothing to learn from."""
    tables["prompts"] |= {"images_per_prompt": 4}
    algorithm = {**VALUE["algorithm"], "selection": {"fraction": 0.5}}
    components = components_with({**tables, "algorithm": algorithm})
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    selected, advantages = [0, 3, 4, 6], np.zeros(8)
    advantages[selected] = [2.0, -1.0, 1.5, -2.5]
    batch = dataclasses.replace(sampled.batch, advantages=advantages)
    transitions = round_transitions(sampled.trajectories, advantages, "cpu")
    found = learner._companions.with_baselines(batch, transitions).baselines
    alone = ValueFunction(ValueSettings(**algorithm["value"]), 4, components.recipe.seed, "cpu")
    expected, _ = alone.learn(transitions, torch.tensor(selected), (0, 0))
    assert found is not None and torch.equal(found, expected) and found[selected].any()


@pytest.mark.rotated(every=2, group="longest")
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tables: dict) -> None:
    tables = {**tables, **VALUE, "rounds": 3, "checkpoint": {"every": 1}}
    whole = Recipe.parse({**tables, "name": "whole"})
    run_training(whole, serial=True)
    run_training(Recipe.parse({**tables, "name": "parted", "rounds": 2}), serial=True)
    parted = Recipe.parse({**tables, "name": "parted"})
    run_training(parted, serial=True, resume=True)
    ends = [
        load_checkpoint(newest_checkpoint(RunFolder(each.run_path()).checkpoints)).learner for each in (whole, parted)
    ]
    assert ends[0].trained.fingerprint == ends[1].trained.fingerprint
    assert ends[0].value.keys() == ends[1].value.keys() and "value.weight/exp_avg" in ends[0].value
    assert all(np.array_equal(ends[0].value[name], ends[1].value[name]) for name in ends[0].value)


def test_a_step_of_a_restored_function_has_the_same_bits_and_another_models_is_refused(tables: dict) -> None:
    components = components_with(tables)
    sampled = sample_round(components, learner_of(components).weights()[-1])
    transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
    settings = ValueSettings(steps=2, batch_size=8)
    one, two = (ValueFunction(settings, 4, seed=0, device="cpu") for _ in range(2))
    one.learn(transitions, torch.arange(8), (0, 0))
    two.load(one.arrays())
    first, second = (each.learn(transitions, torch.arange(8), (1, 0))[0] for each in (one, two))
    assert torch.equal(first, second)
    with pytest.raises(
        ValueError, match=r"the checkpoint's value function has no layers.0.factors.weight of shape \(5, 256\)"
    ):
        ValueFunction(settings, 5, seed=0, device="cpu").load(one.arrays())


def test_packed_latents_of_flux_have_values_too(tables: dict, tmp_path: Path) -> None:
    family = policy_table("flux", save_tiny_flux(tmp_path / "flux"))
    components = components_with(
        {**tables, **VALUE, "policy": family, "learner": {**tables["learner"], "micro_batch_size": 6}}
    )
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["value/loss"] > 0 and np.isfinite(metrics["grad_norm"])
