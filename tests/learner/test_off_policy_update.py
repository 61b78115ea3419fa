"""An update off the policy: what the learner gives the algorithm, when, and the gradient that comes of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import load_weights, trained_parameters
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.trajectory import Column, TransitionBatch
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.reference_passes import Update, precomputed_columns
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions
from ray_ddpo.learner.temporary_weights import temporary_weights
from tests.gradients import ONE_STEP, gradient_of, relative_error
from tests.reference import ddpo_reference as reference
from tests.rounds import SampledRound, components_with, learner_of, sample_round

SEEN: list[TransitionBatch] = []


class Watching(Algorithm):
    """DDPO-IS that asks for proximal and behavior columns and keeps its batches."""

    inner: DDPOImportanceSampling = DDPOImportanceSampling(clip_range=1e-3)

    def compute_advantages(self, statistics, prompts, rewards, images_per_prompt):
        return self.inner.compute_advantages(statistics, prompts, rewards, images_per_prompt)

    @property
    def columns(self) -> set[Column]:
        return {"proximal_log_probs", "behavior_means"}

    def compute_loss(self, policy: Policy, batch: TransitionBatch) -> TransitionLoss:
        if torch.is_grad_enabled():
            SEEN.append(batch)
        return self.inner.compute_loss(policy, batch)


def lagging(components: Components) -> tuple[Learner, SampledRound]:
    """Return a learner one version ahead of the next round's; at lag 0 of the same version."""
    learner, lag = learner_of(components), components.recipe.max_policy_lag
    for round_index in range(lag):
        sampled = sample_round(components, learner.weights()[0], round_index)
        learner.update(sampled.batch, *sampled.trajectories)
    return learner, sample_round(components, learner.weights()[0], lag)


def transition_under(components: Components, weights: PolicyWeights, batch: TransitionBatch):
    policy = components.policy.load("cpu", components.recipe.sampling, "learner")
    load_weights(policy.network, weights)
    with torch.no_grad():
        return policy.transition(batch.latents, batch.steps, batch.conditioning)


@pytest.mark.parametrize("inner_epochs", [1, pytest.param(2, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_references_are_of_the_updates_start_and_of_the_behavior_policy(
    lag: int, inner_epochs: int, tables: dict
) -> None:
    values = {"max_policy_lag": lag, "learner__inner_epochs": inner_epochs}
    components = dataclasses.replace(components_with(tables, **values), algorithm=Watching())
    learner, sampled = lagging(components)
    behavior, start = learner.weights()[0], learner.weights()[-1]
    assert (behavior.fingerprint == start.fingerprint) == (lag == 0)
    SEEN.clear()
    learner.update(sampled.batch, *sampled.trajectories)
    assert len(SEEN) == 2 * 2 * inner_epochs  # two optimizer steps of two micro-batches
    first_step = SEEN[:2]
    # Where the own pass is under the very weights, none is made twice.
    assert all((batch.proximal_log_probs is None) == (inner_epochs == 1) for batch in first_step)
    assert all((batch.behavior_means is None) == (inner_epochs == 1 and lag == 0) for batch in first_step)
    for batch in SEEN:
        if batch.proximal_log_probs is not None:
            expected = transition_under(components, start, batch).log_prob(batch.next_latents)
            torch.testing.assert_close(batch.proximal_log_probs, expected, rtol=0, atol=0)
        if batch.behavior_means is not None:
            torch.testing.assert_close(
                batch.behavior_means, transition_under(components, behavior, batch).mean, rtol=0, atol=0
            )
    assert all(batch.proximal_log_probs is not None and batch.behavior_means is not None for batch in SEEN[2:])


def test_one_optimizer_step_on_the_present_version_needs_no_pass_at_all(tables: dict) -> None:
    components = dataclasses.replace(components_with(tables, **ONE_STEP), algorithm=Watching())
    learner, sampled = lagging(components)
    SEEN.clear()
    learner.update(sampled.batch, *sampled.trajectories)
    assert all(batch.proximal_log_probs is batch.behavior_means is None for batch in SEEN)


def fingerprint_with(tables: dict, off_policy: dict) -> tuple[str, dict[str, float]]:
    tables = {**tables, "algorithm": {**tables["algorithm"], **off_policy}}
    learner, sampled = lagging(components_with(tables, max_policy_lag=1))
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    return after.weights[-1].fingerprint, metrics


def test_defaults_written_out_and_a_mask_that_masks_nothing_change_no_bit(tables: dict) -> None:
    plain, metrics = fingerprint_with(tables, {})
    assert fingerprint_with(tables, {"off_policy": {"ratio": "behavior"}})[0] == plain
    wide, wide_metrics = fingerprint_with(tables, {"off_policy": {"max_drift_nats": 1e9}})
    assert wide == plain and wide_metrics["masked_fraction"] == 0
    assert "masked_fraction" not in metrics and "importance_weight/mean" not in metrics


def test_each_correction_changes_what_is_learned_and_says_so(tables: dict) -> None:
    plain, metrics = fingerprint_with(tables, {})
    proximal, proximal_metrics = fingerprint_with(tables, {"off_policy": {"ratio": "proximal"}})
    weighed, weighed_metrics = fingerprint_with(
        tables, {"off_policy": {"ratio": "proximal", "importance_weight": 1e-3}}
    )
    masked, masked_metrics = fingerprint_with(tables, {"off_policy": {"max_drift_nats": 0.05}})
    assert len({plain, proximal, weighed, masked}) == 4
    for found in (proximal_metrics, weighed_metrics, masked_metrics):  # of the first micro-batches, against behavior
        assert (
            found["ratio/max_abs_log"] == pytest.approx(metrics["ratio/max_abs_log"], rel=0.2)
            and found["ratio/max_abs_log"] > 1e-4
        )
    assert proximal_metrics["clip_fraction"] < metrics["clip_fraction"]
    assert math.exp(-1e-3) <= weighed_metrics["importance_weight/mean"] <= math.exp(1e-3)
    assert 0 < masked_metrics["masked_fraction"] < 1


def test_where_everything_is_masked_no_step_is_taken(tables: dict) -> None:
    tables = {**tables, "algorithm": {**tables["algorithm"], "off_policy": {"max_drift_nats": 1e-9}}}
    components = components_with(tables, max_policy_lag=1)
    learner = learner_of(components)
    first = sample_round(components, learner.weights()[0], 0)
    metrics, _ = learner.update(first.batch, *first.trajectories)
    assert metrics["masked_fraction"] == 0.5  # on the policy that sampled the first step is free, the second has moved
    before = learner.weights()[-1].fingerprint
    sampled = sample_round(components, learner.weights()[0], 1)
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["masked_fraction"] == 1 and metrics["optimizer_steps_skipped"] == metrics["optimizer_steps"] == 2
    assert after.weights[-1].fingerprint == before and metrics["loss"] == 0


BAND, CLIP, LIMIT = 2e-4, 2e-4, 0.05


def slow_loss(policy: Policy, behavior_mean: np.ndarray, batch: TransitionBatch) -> tuple[torch.Tensor, bool]:
    """Return a transition's loss by the formula, from the behavior policy's mean; and whether it is unmasked."""
    transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
    drift = reference.gaussian_kl(transition.mean.detach().numpy(), behavior_mean, float(transition.std))
    log_prob = transition.log_prob(batch.next_latents)
    # One optimizer step: the proximal policy is the present one, so the ratio is 1 and its gradient that of log_prob.
    weight = math.exp(min(max(float(log_prob.detach() - batch.old_log_probs), -BAND), BAND))
    advantage = min(max(float(batch.advantages), -5.0), 5.0)
    return -weight * advantage * torch.exp(log_prob - log_prob.detach()).sum(), drift <= LIMIT


def test_the_gradient_is_that_of_the_decoupled_loss_over_unmasked_transitions(tables: dict) -> None:
    off_policy = {"ratio": "proximal", "importance_weight": BAND, "max_drift_nats": LIMIT}
    tables = {**tables, "algorithm": {"name": "ddpo_is", "clip_range": CLIP, "off_policy": off_policy}}
    components = components_with(tables, max_policy_lag=1, **ONE_STEP)
    learner, sampled = lagging(components)
    behavior, start = learner.weights()
    policy = components.policy.load("cpu", components.recipe.sampling, "learner")
    transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
    batches = [transitions.batch(index[None]) for index in indices_of(torch.arange(4), transitions.positions(0))]
    load_weights(policy.network, start)
    with torch.no_grad(), temporary_weights(policy.network, behavior, start):
        means = [policy.transition(each.latents, each.steps, each.conditioning).mean.numpy() for each in batches]
    results = [slow_loss(policy, mean, batch) for mean, batch in zip(means, batches, strict=True)]
    left = [loss for loss, is_left in results if is_left]
    assert 4 <= len(left) <= len(batches) - 4  # the mask has something to do
    (torch.stack(left).sum() / len(left)).backward()
    expected = {name: value.grad.numpy() for name, value in trained_parameters(policy.network).items()}

    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    error = relative_error(gradient_of(learner), expected)
    print(f"relative error {error:.1e}, masked {metrics['masked_fraction']:.2f}")
    assert error < 1e-4
    assert metrics["masked_fraction"] == pytest.approx(1 - len(left) / len(batches))


def test_a_learner_that_resumes_from_a_state_arrives_at_the_same_bits(tables: dict) -> None:
    off_policy = {"ratio": "proximal", "importance_weight": BAND, "max_drift_nats": LIMIT}
    tables = {**tables, "algorithm": {**tables["algorithm"], "off_policy": off_policy}}
    components = components_with(tables, max_policy_lag=1)
    learner, sampled = lagging(components)
    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(learner.state())
    after = [one.update(sampled.batch, *sampled.trajectories)[1].weights[-1].fingerprint for one in (learner, resumed)]
    assert after[0] == after[1]


def test_weights_that_are_not_the_present_ones_are_given_back_to_the_last_bit(tables: dict) -> None:
    off_policy = {"max_drift_nats": 1e9}
    components = components_with(
        {**tables, "algorithm": {**tables["algorithm"], "off_policy": off_policy}}, max_policy_lag=1
    )
    learner, sampled = lagging(components)
    batch, steps = sampled.batch, [torch.tensor([(0, 0), (1, 0)])]
    transitions = round_transitions(sampled.trajectories, batch.advantages, "cpu")
    behavior, present = learner.weights()
    update = Update(transitions, [steps], behavior, present)
    columns = precomputed_columns(learner._algorithm, learner._policy, update, 8)
    arrays = {name: value.detach().numpy() for name, value in learner._parameters.items()}
    assert set(columns) == {"behavior_means"}
    assert columns["behavior_means"].computed.nonzero().tolist() == [[0, 0], [1, 0]]
    assert pack(1, arrays).fingerprint == learner.weights()[-1].fingerprint
