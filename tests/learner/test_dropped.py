"""Dropped images: they are not trained on, and nothing else changes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import load_weights, read_weights, trained_parameters
from ray_ddpo.common.schedule import transition_order
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.round_data.transitions import indices_of, round_transitions
from tests.gradients import ONE_STEP, gradient_of, model_alphas, reference_network, reference_paths, relative_error
from tests.reference import ddpo_reference as reference
from tests.rounds import SampledRound, components_with, learner_of, sample_round


def without(sampled: SampledRound, *images: int) -> SampledRound:
    """Return the round with these images dropped."""
    advantages = sampled.batch.advantages.copy()
    advantages[list(images)] = np.nan
    batch = dataclasses.replace(sampled.batch, advantages=advantages, dropped=tuple(sorted(images)))
    return SampledRound(batch, sampled.trajectories)


def plain_update(components: Components, sampled: SampledRound) -> str:
    """Make a plain update on all images, and return the fingerprint of the weights."""
    recipe = components.recipe
    policy = components.policy.load("cpu", recipe.sampling, "learner")
    load_weights(policy.network, learner_of(components).weights()[-1])
    parameters = trained_parameters(policy.network).values()
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learner.learning_rate, weight_decay=1e-4, fused=True)
    transitions = round_transitions(sampled.trajectories, sampled.batch.advantages, "cpu")
    for inner_epoch in range(recipe.learner.inner_epochs):
        order = transition_order(recipe.seed, 0, inner_epoch, transitions.num_images)
        for first in range(0, len(order), recipe.learner.images_per_step):
            images = torch.from_numpy(order[first : first + recipe.learner.images_per_step])
            pairs = indices_of(images, transitions.positions(inner_epoch))
            optimizer.zero_grad()
            for start in range(0, len(pairs), recipe.learner.micro_batch_size):
                micro_batch = transitions.batch(pairs[start : start + recipe.learner.micro_batch_size])
                (components.algorithm.compute_loss(policy, micro_batch).loss.sum() / len(pairs)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.learner.max_grad_norm, foreach=True)
            optimizer.step()
    return read_weights(policy.network, 1).fingerprint


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_a_round_without_any_is_the_plain_update_to_the_last_bit(inner_epochs: int, tables: dict) -> None:
    components = components_with(tables, learner__inner_epochs=inner_epochs)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    _, after = learner.update(sampled.batch, *sampled.trajectories)
    assert after.weights[-1].fingerprint == plain_update(components, sampled)


def test_the_gradient_is_that_of_the_papers_over_the_images_that_are_left(tables: dict, tiny_model: Path) -> None:
    components = components_with(tables, **ONE_STEP)
    learner = learner_of(components)
    weights = learner.weights()[-1]
    sampled = without(sample_round(components, weights), 2)  # 12 pairs are left: a micro-batch of 8 and one of 4
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    setting = reference.Setting(model_alphas(tiny_model), num_steps=4, guidance_scale=3.0, clip_range=1e-3)
    paths = [path for image, path in enumerate(reference_paths(sampled, tiny_model)) if image != 2]
    unconditional = reference.text_embedding(tiny_model, "").double()
    expected = reference.ddpo_gradient(reference_network(tiny_model, weights), unconditional, paths, setting)
    error = relative_error(gradient_of(learner), {name: value.numpy() for name, value in expected.items()})
    print(f"relative error of the gradient: {error:.1e}")
    assert error < 3e-5
    assert metrics["optimizer_steps"] == 1 and metrics["optimizer_steps_skipped"] == 0


def test_an_optimizer_step_without_images_is_skipped_and_the_other_is_unchanged(tables: dict) -> None:
    components = components_with(tables)
    first, second = transition_order(components.recipe.seed, 0, 0, 8).reshape(2, 4)
    found = {}
    for name, images in (("first", first), ("second", second)):
        learner = learner_of(components)
        sampled = without(sample_round(components, learner.weights()[-1]), *images.tolist())
        metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
        assert metrics["optimizer_steps"] == 2 and metrics["optimizer_steps_skipped"] == 1
        assert metrics["ratio/max_abs_log"] < 1e-5  # whichever is left is the first
        assert all(math.isfinite(value) for value in metrics.values())
        steps = {float(v) for key, v in learner.state().optimizer.items() if key.endswith("/step")}
        assert steps == {1.0}
        found[name] = learner.weights()[-1].fingerprint
    assert found["first"] != found["second"]


def test_no_number_of_a_dropped_image_reaches_the_weights_or_the_metrics(tables: dict) -> None:
    components = components_with(tables, learner__inner_epochs=2)
    found = []
    for damage in (False, True):
        learner = learner_of(components)
        sampled = without(sample_round(components, learner.weights()[-1]), 0, 5)
        if damage:
            for trajectory, row in zip(sampled.trajectories, (0, 1), strict=True):
                trajectory.latents[row], trajectory.log_probs[row] = math.nan, math.nan
        metrics, after = learner.update(sampled.batch, *sampled.trajectories)
        assert all(math.isfinite(value) for value in metrics.values())
        found.append((after.weights[-1].fingerprint, {**metrics, "seconds/learn": 0}))
    assert found[0] == found[1]
