"""Updates of every algorithm on a real pipeline: training data, weights, and bits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import load_weights, trained_parameters
from ray_ddpo.common.policy_weights import averaged, pack
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.epochs import steps_of_epochs
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples, training_items
from ray_ddpo.learner.round_data.transitions import RoundTransitions, indices_of, round_transitions
from tests.gradients import ONE_STEP, gradient_of, relative_error
from tests.rounds import SampledRound, components_with, learner_of, sample_round


def of(tables: dict, name: str, **values: object) -> Components:
    """Return the small recipe with another algorithm, with groups of two and one optimizer step."""
    keys = {"prompts__images_per_prompt": 2, "learner__batch_size": 8, "learner__micro_batch_size": 8}
    tables = {**tables, "algorithm": {"name": name}}
    if build(ALGORITHMS, {"name": name}, "algorithm").restarts_per_image:
        keys["sampling__backprop_steps"] = 1
        tables["reward"] = {"name": "colourfulness"}
    if name == "gardo":
        tables["algorithm"] |= {"gate": False, "diversity": False}  # which need a second reward and images
    if name == "refl":
        tables["algorithm"]["margin"] = 1000.0  # above every image's reward, so that all have a gradient
    if name == "gardo":  # its gate compares rewards, and its advantages thumbnails
        tables["rewards"] = [tables.pop("reward"), {"name": "brightness", "weight": 0}]
        tables["sampling"] = {**tables["sampling"], "thumbnails": True}
    return components_with(tables, **{**keys, **values})


def with_advantages(sampled: SampledRound, components: Components) -> SampledRound:
    """Return the round with the algorithm's advantages of random rewards."""
    rewards = np.random.default_rng(sampled.batch.round).normal(size=len(sampled.batch.advantages))
    prompts = [prompt.text for report in sampled.batch.reports for prompt in report.task.prompts]
    _, advantages = components.algorithm.compute_advantages(
        {}, prompts, rewards, components.recipe.prompts.images_per_prompt
    )
    batch = dataclasses.replace(sampled.batch, advantages=components.algorithm.from_advantages(advantages))
    return SampledRound(batch, sampled.trajectories)


def learn(learner: Learner, components: Components, round_index: int) -> tuple[dict[str, float], LearnerState]:
    lag = components.recipe.max_policy_lag
    weights = learner.weights()[0 if lag else -1]
    sampled = with_advantages(sample_round(components, weights, round_index), components)
    return learner.update(sampled.batch, *sampled.trajectories)


IN_TURNS = (pytest.mark.thorough, pytest.mark.rotated(every=3))
RESUMED = [  # one of each kind always; the others share its lines
    pytest.param(name, marks=() if name in ("ddpo_is", "diffusion_nft") else IN_TURNS) for name in ALGORITHMS
]


@pytest.mark.rotated(every=3, group="resumed")
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_resumes_from_its_checkpoint_arrives_at_the_same_bits(
    name: str, tables: dict, tmp_path: Path
) -> None:
    components = of(tables, name)
    learner = learner_of(components)
    _, after = learn(learner, components, 0)
    saved = save_checkpoint(Storage(tmp_path), Checkpoint(1, after, {}), keep=1)
    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(load_checkpoint(saved).learner)
    ends = [learn(each, components, 1)[1] for each in (learner, resumed)]
    assert ends[0].trained.fingerprint == ends[1].trained.fingerprint != after.trained.fingerprint
    assert [each.weights[-1].fingerprint for each in ends] == [ends[0].weights[-1].fingerprint] * 2


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ddpo_sf"])
def test_at_a_lag_every_algorithm_trains_on_data_of_an_older_version(name: str, tables: dict) -> None:
    components = of(tables, name, max_policy_lag=1)
    learner = learner_of(components)
    first, _ = learn(learner, components, 0)
    metrics, _ = learn(learner, components, 1)
    assert (
        metrics["log_prob_check/max_abs"] < 1e-5 and np.isfinite(metrics["loss"]) and first["loss"] != metrics["loss"]
    )


def test_samplers_sample_with_the_moving_average_where_the_algorithm_has_one(tables: dict) -> None:
    tables = {**tables, "algorithm": {"name": "diffusion_nft", "ema_decay_growth": 0.25, "ema_decay_max": 0.4}}
    components = components_with(tables, learner__micro_batch_size=4, prompts__images_per_prompt=2)
    learner = learner_of(components)
    start = learner.weights()[-1]
    _, one = learn(learner, components, 0)
    _, two = learn(learner, components, 1)
    first = 0.25 * start.buffer + 0.75 * one.trained.buffer
    np.testing.assert_allclose(one.weights[-1].buffer, first, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(two.weights[-1].buffer, 0.4 * first + 0.6 * two.trained.buffer, rtol=1e-6, atol=1e-8)
    assert two.own_weights is not None and two.weights[-1].policy_version == two.own_weights.policy_version == 2
    assert averaged(start, one.trained, 0.0).fingerprint == one.trained.fingerprint


def test_an_algorithm_without_an_average_publishes_what_it_trains_and_saves_it_once(tables: dict) -> None:
    components = of(tables, "ddpo_is")
    _, after = learn(learner_of(components), components, 0)
    assert after.own_weights is None and after.trained is after.weights[-1]


@pytest.mark.rotated(every=2, group="longest")
def test_old_predictions_are_those_of_the_weights_that_sampled(tables: dict) -> None:
    """The gradient at lag 1 is of a network compared with its predictions two versions ago."""
    algorithm = {"name": "diffusion_nft", "noised_samples": 2}
    keys = {"max_policy_lag": 1, "learner__micro_batch_size": 1, "prompts__images_per_prompt": 2}
    components = components_with({**tables, "algorithm": algorithm}, **keys, **ONE_STEP)
    learner = learner_of(components)
    learn(learner, components, 0)
    behavior, present = learner.weights()[0], learner.state().trained
    sampled = with_advantages(sample_round(components, behavior, 1), components)
    policy = components.policy.load("cpu", components.recipe.sampling, "learner")
    pairs = _items(learner, sampled)
    load_weights(policy.network, behavior)
    batches = [pairs.batch(index[None]) for index in indices_of(torch.arange(4), pairs.positions(0))]
    with torch.no_grad():
        old = [_denoise(policy, batch)[0] for batch in batches]
    load_weights(policy.network, present)
    loss = torch.zeros(())
    for batch, before in zip(batches, old, strict=True):
        predicted, target = _denoise(policy, batch)
        r = float(batch.weights)
        for share, branch in ((r, predicted), (1 - r, 2 * before - predicted)):  # β = 1
            error = branch - target
            loss = loss + 5 * share * error.square().mean() / error.detach().abs().mean() / len(batches)
    loss.backward()
    expected = {name: value.grad.numpy() for name, value in trained_parameters(policy.network).items()}
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    error = relative_error(gradient_of(learner), expected)
    print(f"relative error {error:.1e}")
    assert error < 1e-4 and metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def _transitions(sampled: SampledRound) -> RoundTransitions:
    return round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")


def _items(learner: Learner, sampled: SampledRound) -> RoundTransitions | NoisedSamples:
    timesteps = learner._policy.num_train_timesteps
    return training_items(learner._algorithm, sampled.batch, _transitions(sampled), timesteps)


def _denoise(policy, batch):
    return policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)


def test_a_fresh_adapter_has_no_kl_to_the_pretrained_model(tables: dict) -> None:
    components = components_with({**tables, "algorithm": {"name": "dpok"}}, **ONE_STEP)
    fresh = Learner(components.policy, components.algorithm, components.recipe)
    sampled = sample_round(components, fresh.weights()[-1])
    assert fresh.update(sampled.batch, *sampled.trajectories)[0]["kl_reference_nats"] == 0

    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    policy = components.policy.load(
        "cpu", components.recipe.sampling, "learner"
    )  # adapters fresh from their start change nothing
    transitions = _transitions(sampled)
    batch = transitions.batch(indices_of(torch.arange(4), transitions.positions(0)))
    with torch.no_grad():
        pretrained = policy.transition(batch.latents, batch.steps, batch.conditioning)
        load_weights(policy.network, learner.weights()[-1])
        moved = policy.transition(batch.latents, batch.steps, batch.conditioning)
    distance = ((moved.mean - pretrained.mean).double() / moved.std.view(-1, 1, 1, 1)).square().flatten(1).sum(1) / 2
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["kl_reference_nats"] == pytest.approx(float(distance.mean()), rel=1e-4)
    assert float(distance.mean()) > 1


@pytest.mark.thorough
def test_the_kl_pulls_the_policy_back_to_the_pretrained_model(tables: dict) -> None:
    def distance(coefficient: float) -> float:
        table = {"name": "dpok", "kl_coef": coefficient}
        components = components_with({**tables, "algorithm": table}, learner__learning_rate=1e-2)
        learner = learner_of(components)
        for round_index in range(3):
            sampled = sample_round(components, learner.weights()[-1], round_index)
            batch = dataclasses.replace(sampled.batch, advantages=np.zeros(8))
            metrics, _ = learner.update(batch, *sampled.trajectories)
        return metrics["kl_reference_nats"]

    assert distance(10.0) < 0.8 * distance(1e-9)


def test_only_the_images_that_count_enter_the_sparse_steps(tables: dict) -> None:
    components = components_with({**tables, "algorithm": {"name": "rwr_sparse"}}, learner__micro_batch_size=2)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    batch = dataclasses.replace(sampled.batch, advantages=np.array([1.0, 0, 0, 1, 1, 0, 1, 1]), dropped=())
    items = _items(learner, SampledRound(batch, sampled.trajectories))
    (steps,) = steps_of_epochs(components.recipe, components.algorithm, batch, items)
    assert [len(step) for step in steps] == [5]  # four make a step, and what is left over joins it
    assert {image for step in steps for image, _ in step.tolist()} == {0, 3, 4, 6, 7}
    metrics, _ = learner.update(batch, *sampled.trajectories)
    assert metrics["optimizer_steps"] == 1 and "ratio/mean" not in metrics and np.isfinite(metrics["kl_nats"])


@pytest.mark.thorough
def test_inner_epochs_end_when_the_budget_of_kl_is_spent(tables: dict) -> None:
    values = {"learner__inner_epochs": 4, "learner__learning_rate": 3e-3}

    def update(**more: object) -> tuple[float, str]:
        components = components_with(tables, **values, **more)
        learner = learner_of(components)
        sampled = sample_round(components, learner.weights()[-1])
        metrics, after = learner.update(sampled.batch, *sampled.trajectories)
        return metrics["optimizer_steps"], after.trained.fingerprint

    free, spent = update(), update(learner__max_kl_nats=1e-9)
    assert free == update(learner__max_kl_nats=1e9) and spent == update(learner__max_kl_nats=1e-9)
    assert (free[0], spent[0]) == (8, 2) and free[1] != spent[1]


def test_a_window_is_trained_on_with_a_ratio_of_one(tables: dict) -> None:
    components = components_with(tables, sampling__sde_window=2, learner__micro_batch_size=4)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    assert all(trajectory.steps.shape == (4, 2) for trajectory in sampled.trajectories)
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["ratio/max_abs_log"] < 1e-5
    start = int(sampled.trajectories[0].steps[0, 0])
    assert {name for name in metrics if name.startswith("kl_nats/")} == {
        f"kl_nats/step_{start + step:02d}" for step in (0, 1)
    }


def test_an_average_of_weights_is_packed_like_them() -> None:
    old, new = pack(3, {"a": np.array([1.0, 2.0], np.float32)}), pack(4, {"a": np.array([3.0, 6.0], np.float32)})
    assert averaged(old, new, 0.25).buffer.tolist() == [2.5, 5.0] and averaged(old, new, 0.25).policy_version == 4
