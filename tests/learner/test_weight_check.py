"""Weights that silently did not arrive are found before anything is learned; those that did pass."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.diffusion.lora.adapters import read_weights
from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.transitions import RoundTransitions, round_transitions
from ray_ddpo.learner.temporary_weights import temporary_weights
from ray_ddpo.learner.weight_check import WeightsDidNotArrive, log_prob_tolerance, rows_to_check
from tests.rounds import SampledRound, components_with, learner_of, moved, sample_round

PER_IMAGE = ("prompt_index", "steps", "log_probs", "latents", "next_latents", "final_latents")


def learner_at_lag(components: Components) -> tuple[Learner, PolicyWeights]:
    """Return a learner `max_policy_lag` versions ahead of the next round, and the weights to sample that with."""
    learner, lag = learner_of(components), components.recipe.max_policy_lag
    for round_index in range(lag):
        sampled = sample_round(components, learner.weights()[0], round_index)
        learner.update(sampled.batch, *sampled.trajectories)
    return learner, learner.weights()[0]


def silently_drawn_with(other: PolicyWeights, components: Components, claimed: PolicyWeights) -> SampledRound:
    """Return the next round, sampled with other weights than its reports claim."""
    sampled = sample_round(components, other, components.recipe.max_policy_lag)
    return SampledRound(sampled.with_reports(fingerprint=claimed.fingerprint), sampled.trajectories)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_weights_that_did_not_arrive_are_found_and_the_learner_is_unchanged(lag: int, tables: dict) -> None:
    components = components_with(tables, max_policy_lag=lag)
    learner, claimed = learner_at_lag(components)
    before = learner.state()
    sampled = silently_drawn_with(moved(claimed, seed=2), components, claimed)
    message = r"version 0, and at its trained step \d .* differs .* tolerance of 0.0001: it was"
    with pytest.raises(WeightsDidNotArrive, match=message):
        learner.update(sampled.batch, *sampled.trajectories)
    assert_same_bits(learner, before)


def assert_same_bits(learner: Learner, before) -> None:
    after = learner.state()
    present = read_weights(learner._policy.network, after.policy_version)
    assert present.fingerprint == before.weights[-1].fingerprint
    assert [weights.fingerprint for weights in after.weights] == [weights.fingerprint for weights in before.weights]
    assert after.optimizer.keys() == before.optimizer.keys()
    assert all(np.array_equal(value, before.optimizer[name]) for name, value in after.optimizer.items())


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("lag", [1, 2])
def test_a_sampler_that_stayed_on_the_newest_version_or_the_one_before_is_found(lag: int, tables: dict) -> None:
    components = components_with(tables, max_policy_lag=lag)
    learner, claimed = learner_at_lag(components)
    newest = dataclasses.replace(learner.weights()[-1], policy_version=claimed.policy_version)
    sampled = silently_drawn_with(newest, components, claimed)
    with pytest.raises(WeightsDidNotArrive):
        learner.update(sampled.batch, *sampled.trajectories)


def test_one_task_of_a_round_is_enough_to_be_found(tables: dict) -> None:
    components = components_with(
        tables, learner__micro_batch_size=4
    )  # less than one image of each task with all its steps
    learner, claimed = learner_at_lag(components)
    right = sample_round(components, claimed)
    wrong = silently_drawn_with(moved(claimed, seed=2), components, claimed)
    with pytest.raises(WeightsDidNotArrive, match="task 1 says that it was sampled with version 0"):
        learner.update(right.batch, right.trajectories[0], wrong.trajectories[1])


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(
    ("micro_batch_size", "lag"),
    [(8, 0), (8, 1), (8, 2), (1, 0), *(pytest.param(1, lag, marks=pytest.mark.thorough) for lag in (1, 2))],
)
def test_in_float32_what_arrived_passes_whatever_the_batch_is_composed_of(
    lag: int, micro_batch_size: int, tables: dict
) -> None:
    components = components_with(tables, max_policy_lag=lag, learner__micro_batch_size=micro_batch_size)
    learner, weights = learner_at_lag(components)
    sampled = sample_round(components, weights, lag)
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    print(f"lag {lag}, {micro_batch_size} pairs: {metrics['log_prob_check/max_abs']:.1e}")
    assert metrics["log_prob_check/max_abs"] <= 1e-5
    assert lag == 0 or metrics["ratio/max_abs_log"] > 1e-4  # the policy that learns had moved by then


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_passes_at_its_own_tolerance(dtype: str, tables: dict) -> None:
    components = components_with(tables, policy__dtype=dtype, max_policy_lag=1)
    learner, weights = learner_at_lag(components)
    sampled = sample_round(components, weights, 1)
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    print(f"{dtype}: {metrics['log_prob_check/max_abs']:.1e}")
    assert metrics["log_prob_check/max_abs"] <= 1e-2


def test_after_a_resume_a_version_is_checked_again(tables: dict) -> None:
    components = components_with(tables, max_policy_lag=1)
    learner, claimed = learner_at_lag(components)
    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(learner.state())
    sampled = silently_drawn_with(moved(claimed, seed=2), components, claimed)
    with pytest.raises(WeightsDidNotArrive):
        resumed.update(sampled.batch, *sampled.trajectories)


def test_a_log_prob_that_is_no_number_does_not_pass(tables: dict) -> None:
    components = components_with(tables)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    sampled.trajectories[1].log_probs[0] = torch.nan
    with pytest.raises(WeightsDidNotArrive, match="task 1 .* log_prob of image 0 is no finite number"):
        learner.update(sampled.batch, *sampled.trajectories)


def test_the_tolerance_is_the_recipes_or_follows_from_how_exactly_both_compute() -> None:
    def policy(**keys: Any) -> PolicyConfig:
        return StableDiffusion(model="tiny_animals", **keys)

    exact = [policy(), policy(compile="both"), policy(compile="sampler", merge_adapters=True)]
    assert [log_prob_tolerance(None, each) for each in exact] == [1e-4] * 3
    assert log_prob_tolerance(None, policy(dtype="float16", sampler_dtype="float32")) == 1e-4
    half = [policy(dtype="float16"), policy(dtype="bfloat16"), policy(sampler_dtype="bfloat16")]
    assert [log_prob_tolerance(None, each) for each in half] == [1e-2] * 3
    assert log_prob_tolerance(0.5, policy()) == 0.5


def test_the_recipes_tolerance_is_the_one_that_counts(tables: dict) -> None:
    components = components_with(tables, learner__log_prob_tolerance=1e-12, learner__micro_batch_size=4)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    sampled.trajectories[0].log_probs[0] += 1e-6
    with pytest.raises(WeightsDidNotArrive, match="over the tolerance of 1e-12"):
        learner.update(sampled.batch, *sampled.trajectories)


def test_temporary_weights_are_replaced_bit_for_bit_even_after_an_error(tables: dict) -> None:
    components = components_with(tables)
    learner = learner_of(components)
    network, present = learner._policy.network, learner.weights()[-1]
    other = moved(present, seed=5)
    with temporary_weights(network, other, present):
        assert read_weights(network, 0).fingerprint == other.fingerprint
    assert read_weights(network, 0).fingerprint == present.fingerprint
    with pytest.raises(KeyError), temporary_weights(network, other, present):
        raise KeyError
    assert read_weights(network, 0).fingerprint == present.fingerprint


def test_no_weights_are_loaded_if_the_version_is_the_present_one(tables: dict) -> None:
    components = components_with(tables)
    learner = learner_of(components)
    parameters = list(learner._parameters.values())
    counts = [parameter._version for parameter in parameters]  # torch counts every change in place
    with temporary_weights(learner._policy.network, learner.weights()[-1], learner.weights()[-1]):
        pass
    assert [parameter._version for parameter in parameters] == counts


@pytest.fixture
def transitions(tables: dict) -> RoundTransitions:
    """Return the transitions of two tasks of four images with four steps each."""
    components = components_with(tables)
    sampled = sample_round(components, learner_of(components).weights()[-1])
    return round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")


def _rows(transitions: RoundTransitions, dropped: tuple[int, ...], rows: int) -> list:
    return [batch.tolist() for batch in rows_to_check(transitions, dropped, rows)]


def test_each_transition_is_checked_in_its_row_and_the_tasks_take_turns(transitions: RoundTransitions) -> None:
    assert _rows(transitions, (), 4) == [[[0, 0], [5, 1], [2, 1], [7, 2]]]
    assert _rows(transitions, (0, 5), 4) == [[[4, 1], [1, 0], [2, 1], [7, 2]]]
    assert _rows(transitions, (0, 4), 4) == [[[-1, -1], [5, 1], [2, 1], [7, 2]]]
    assert _rows(transitions, tuple(range(8)), 4) == []


def test_a_round_of_small_batches_has_eight_of_its_tasks_checked(transitions: RoundTransitions) -> None:
    halves = tuple(
        dataclasses.replace(each, **{name: getattr(each, name)[row : row + 1] for name in PER_IMAGE})
        for each in transitions.trajectories
        for row in range(4)
    )
    many = round_transitions(halves, np.zeros(8), "cpu")
    assert [image for ((image, _),) in _rows(many, (), 1)] == list(range(8))


def test_a_row_without_a_transition_has_difference_0_and_dropped_rows_no_check(tables: dict) -> None:
    components = components_with(tables)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    sampled.trajectories[0].log_probs[0] = 9.0
    sampled.trajectories[1].log_probs[0] = 9.0  # both are row 0, and dropped
    batch = dataclasses.replace(sampled.batch, dropped=(0, 4))
    batch.advantages[[0, 4]] = np.nan
    metrics, _ = learner.update(batch, *sampled.trajectories)
    assert metrics["log_prob_check/max_abs"] <= 1e-5


def test_a_sampler_on_another_machine_may_round_otherwise_but_not_return_nan(tables: dict) -> None:
    components = components_with(tables)
    elsewhere = Machine(processor="another", versions="other")
    for log_prob, refused in ((9.0, False), (torch.inf, True)):
        learner = learner_of(components)
        sampled = sample_round(components, learner.weights()[-1])
        sampled.trajectories[0].log_probs[:] = log_prob
        batch = sampled.with_reports(machine=elsewhere)
        with pytest.raises(WeightsDidNotArrive) if refused else nullcontext():
            metrics, _ = learner.update(batch, *sampled.trajectories)
            assert metrics["log_prob_check/max_abs"] > 1
