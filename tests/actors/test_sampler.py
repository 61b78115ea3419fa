"""The sampler: a task under the version it asks for, echoed with proof of the weights, and always the same bits."""

import dataclasses

import numpy as np
import pytest
import torch

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.actors.task_care import Care
from ray_ddpo.common.diffusion.lora.adapters import load_weights
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.policy_weights import PolicyWeights, pack
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.learner import Learner
from tests.rounds import components_with, moved


@pytest.fixture
def components(tables: dict) -> Components:
    return components_with(tables, policy__lora__rank=2)


@pytest.fixture
def sampler(components: Components) -> Sampler:
    return Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)


@pytest.fixture
def weights(components: Components) -> PolicyWeights:
    return moved(Learner(components.policy, components.algorithm, components.recipe).weights()[-1])


def tasks_of(components: Components, round_index: int = 0) -> list[Task]:
    return round_tasks(components.recipe, round_index, components.prompts.load())


def of_version(weights: PolicyWeights, version: int, seed: int) -> PolicyWeights:
    other = moved(weights, seed)
    return pack(version, other.arrays())


def test_the_report_echoes_the_task_and_the_weights_that_sampled_it(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = tasks_of(components)[1]
    report, trajectory, images = sampler.sample(task, weights)
    assert report.task == task and images.prompts == task.prompts
    assert report.fingerprint == weights.fingerprint
    assert report.num_loaded_params == len(weights.manifest) == 64
    assert report.trajectory_bytes == trajectory.num_bytes and report.seconds > 0


def test_a_task_is_sampled_with_its_weights_and_its_images_are_its_decoded_latents(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task, recipe = tasks_of(components)[0], components.recipe
    _, trajectory, images = sampler.sample(task, weights)
    policy = components.policy.load("cpu", recipe.sampling, "sampler")
    load_weights(policy.network, weights)
    expected = sample_trajectories(policy, [prompt.text for prompt in task.prompts], list(task.seeds), recipe.sampling)
    assert torch.equal(trajectory.next_latents, expected.next_latents)
    assert torch.equal(trajectory.log_probs, expected.log_probs)
    assert np.array_equal(images.pixels, policy.decode(expected.final_latents).numpy())


def test_a_task_sampled_again_by_another_sampler_has_the_same_bits(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    first, second = tasks_of(components)
    _, there, _ = sampler.sample(second, weights)
    sampler.sample(first, weights)
    other = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    for sampled in (sampler.sample(second, weights), other.sample(second, weights)):
        assert torch.equal(sampled[1].next_latents, there.next_latents)


def test_weights_are_loaded_between_tasks_there_and_back(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    first, _ = tasks_of(components)
    later, newer = dataclasses.replace(first, policy_version=1), of_version(weights, 1, seed=5)
    _, old_path, _ = sampler.sample(first, weights)
    report, new_path, _ = sampler.sample(later, newer)
    assert report.fingerprint == newer.fingerprint != weights.fingerprint
    assert not torch.equal(new_path.final_latents, old_path.final_latents)
    assert torch.equal(new_path.latents[:, 0], old_path.latents[:, 0])  # the noise is the seeds' own
    assert torch.equal(sampler.sample(first, weights)[1].final_latents, old_path.final_latents)


def test_weights_of_another_version_than_the_tasks_are_refused(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = dataclasses.replace(tasks_of(components)[1], round=4, policy_version=3)
    text = "task 1 of round 4 asks for policy version 3, and came with weights of version 0"
    with pytest.raises(ValueError, match=text):
        sampler.sample(task, weights)


def test_damaged_weights_are_refused_and_the_next_task_is_sampled_as_ever(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = tasks_of(components)[0]
    _, before, _ = sampler.sample(task, weights)
    damaged = dataclasses.replace(weights, buffer=weights.buffer + 1, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="arrived with fingerprint"):
        sampler.sample(task, damaged)
    report, after, _ = sampler.sample(task, weights)
    assert report.fingerprint == weights.fingerprint and torch.equal(after.next_latents, before.next_latents)


def test_an_image_that_is_not_decoded_is_black_and_changes_no_other(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = tasks_of(components)[0]
    whole, trajectory, images = sampler.sample(task, weights)
    care = Care(not_decoded=(1, 3))
    report, same, others = sampler.sample(task, weights, care)
    assert torch.equal(same.final_latents, trajectory.final_latents)
    for row in range(len(task.seeds)):
        expected = np.zeros_like(images.pixels[row]) if row in (1, 3) else images.pixels[row]
        assert np.array_equal(others.pixels[row], expected)
    assert report.dropped == care.left_out and whole.dropped == {}
    assert [row for row, found in enumerate(report.image_fingerprints) if not found] == [1, 3]
    assert report.image_fingerprints[0] == whole.image_fingerprints[0]


def test_an_image_that_is_not_sampled_is_replaced_by_another_one(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = tasks_of(components)[0]
    _, trajectory, images = sampler.sample(task, weights)
    report, without, others = sampler.sample(task, weights, Care(not_sampled=(0,)))
    assert torch.equal(without.final_latents[0], without.final_latents[1]) and not others.pixels[0].any()
    assert torch.allclose(without.final_latents[1:], trajectory.final_latents[1:], atol=1e-4)
    assert list(report.dropped) == [0] and report.task == task
    with pytest.raises(ValueError, match="every image of round 0, task 0"):
        sampler.sample(task, weights, Care(not_sampled=tuple(range(len(task.seeds)))))


@pytest.mark.parametrize("what", ["decoding", "all"])
def test_where_images_are_tried_one_by_one_each_is_noted_before(
    sampler: Sampler, components: Components, weights: PolicyWeights, what: str
) -> None:
    task, noted = tasks_of(components)[0], []
    report, _, images = sampler.sample(task, weights, Care(what, not_decoded=(2,)), noted.append)
    assert noted == [0, 1, 3] and (report is None) == (what == "all")
    if images is not None:
        _, _, whole = sampler.sample(task, weights)
        difference = images.pixels[[0, 1, 3]].astype(int) - whole.pixels[[0, 1, 3]]
        assert np.abs(difference).max() <= 1 and not images.pixels[2].any()


def test_without_any_image_the_images_are_black(
    sampler: Sampler, components: Components, weights: PolicyWeights
) -> None:
    task = tasks_of(components)[0]
    _, _, whole = sampler.sample(task, weights)
    report, _, images = sampler.sample(task, weights, Care(not_decoded=tuple(range(len(task.seeds)))))
    assert len(report.dropped) == len(task.seeds) and not images.pixels.any()
    assert images.pixels.shape == whole.pixels.shape  # of a decoder that does not make 8 × 8 pixels of a latent
