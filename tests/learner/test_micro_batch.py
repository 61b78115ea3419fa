"""The largest micro-batch is found, kept over a resume, and refused with advice if not even one transition fits."""

import dataclasses
from collections import namedtuple

import pytest
import torch

import ray_ddpo.learner.optimization.micro_batch as module
from ray_ddpo.learner.optimization.micro_batch import MOST_ON_CPU, StepTrial, gpu_limit, largest_that_fits
from tests.rounds import components_with, learner_of, sample_round

Memory = namedtuple("Memory", "available")
AUTO = {"learner__micro_batch_size": "auto"}


def of_size(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: Memory(available))


@pytest.mark.parametrize("predicted", [0, 1, 3, 5, 12, 100])
@pytest.mark.parametrize(("limit", "largest"), [(9, 0), (10, 1), (35, 3), (59, 4), (119, 6), (120, 12), (1000, 12)])
def test_the_largest_divisor_that_fits_is_found_from_any_prediction_that_is_near(
    predicted: int, limit: int, largest: int
) -> None:
    tried: list[int] = []

    def peak(pairs: int) -> float:
        tried.append(pairs)
        return 10.0 * pairs

    assert largest_that_fits(12, limit, predicted, peak) == largest
    assert len(tried) == len(set(tried))


def test_a_run_with_enough_memory_takes_the_largest_size_for_a_cpu(tables: dict) -> None:
    learner = learner_of(components_with(tables, **AUTO))
    assert learner.state().micro_batch_size == 16  # all pairs of an optimizer step
    assert MOST_ON_CPU >= 16


def test_a_run_with_little_memory_takes_less_and_says_what_to_do_about_none(
    tables: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = components_with(tables, **AUTO)
    sizes = components.policy.sizes(components.recipe.sampling, "cpu")
    of_size(monkeypatch, sizes.learner.of(7) / 0.9)
    assert learner_of(components).state().micro_batch_size == 4
    of_size(monkeypatch, sizes.learner.of(1))
    with pytest.raises(
        ValueError, match=r'"auto", and one transition takes .* GB .* policy\.gradient_checkpointing = true'
    ):
        learner_of(components)


def test_a_rank_may_use_all_of_a_shared_gpu_but_what_its_sampler_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    assert gpu_limit(0.5) == 0.9 * (40e9 - 0.6e9)
    assert gpu_limit(0.9, processes=2, beside=10e9) == 0.9 * (72e9 - 1.2e9) - 10e9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20e9, 80e9))
    assert gpu_limit(0.9, processes=2, beside=10e9) == 0.9 * 20e9, "never more than is free now"


def test_the_number_found_learns_as_the_same_number_given(tables: dict) -> None:
    found, given = (learner_of(components_with(tables, learner__micro_batch_size=size)) for size in ("auto", 16))
    sampled = sample_round(components_with(tables, **AUTO), found.weights()[-1])
    (metrics, state), (_, other) = (learner.update(sampled.batch, *sampled.trajectories) for learner in (found, given))
    assert metrics["learner/micro_batch_size"] == 16
    assert state.trained.fingerprint == other.trained.fingerprint
    assert state.micro_batch_size == other.micro_batch_size == 16


def test_a_resumed_learner_keeps_the_size_that_was_found_before(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_with(tables, **AUTO)
    before = learner_of(components)
    of_size(monkeypatch, components.policy.sizes(components.recipe.sampling, "cpu").learner.of(2) / 0.9)
    after = learner_of(components)
    assert after.state().micro_batch_size == 2
    after.load_state(before.state())
    sampled = sample_round(components, before.weights()[-1])
    trained = [learner.update(sampled.batch, *sampled.trajectories)[1].trained for learner in (before, after)]
    assert trained[0].fingerprint == trained[1].fingerprint
    after.load_state(dataclasses.replace(before.state(), micro_batch_size=None))  # of an older checkpoint
    assert after.state().micro_batch_size == 16


def test_a_number_that_is_given_stays_whatever_the_state_says(tables: dict) -> None:
    learner = learner_of(components_with(tables, learner__micro_batch_size=4))
    learner.load_state(dataclasses.replace(learner.state(), micro_batch_size=2))
    assert learner.state().micro_batch_size == 4


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    "algorithm", [{"name": "ddpo_is"}, {"name": "ddpo_is", "kl_coef": 0.1}, {"name": "diffusion_nft"}], ids=str
)
def test_a_trial_takes_what_is_predicted_and_leaves_no_trace(algorithm: dict, tables: dict) -> None:
    components = components_with(
        {**tables, "algorithm": algorithm}, learner__micro_batch_size=4, prompts__images_per_prompt=2
    )
    policy = components.policy.load("cpu", components.recipe.sampling, "learner")
    sizes = components.policy.sizes(components.recipe.sampling, "cpu")
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    random = torch.get_rng_state()
    peak = StepTrial(policy, components.algorithm, sizes).peak(4)
    assert peak == pytest.approx(sizes.learner.of(4), rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in policy.network.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.network.parameters())
    assert torch.equal(torch.get_rng_state(), random)
