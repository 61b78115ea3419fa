"""The learner: its gradient is the papers', its state continues to the same bits, and what does not fit is refused."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import load_weights, reference_policy
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.learner import Learner
from tests.gradients import (
    ONE_STEP,
    gradient_of,
    model_alphas,
    reference_network,
    reference_paths,
    relative_error,
    updated,
)
from tests.reference import ddpo_reference as reference
from tests.rounds import SampledRound, components_with, learner_of, sample_round, stale


def test_a_learner_that_sees_another_folder_than_the_driver_says_so(tables: dict, tmp_path: Path) -> None:
    components = components_with(tables)
    learner = Learner(components.policy, components.algorithm, components.recipe)
    with RunFolder(tmp_path / "shared").token() as token:
        learner.check_folder(str(tmp_path / "shared"), token)
        with pytest.raises(ValueError, match="output_dir: .*elsewhere on the learner's machine is not the driver's"):
            learner.check_folder(str(tmp_path / "elsewhere"), token)


SHIFTS = [-4e-3, -4e-4, 0.0, 4e-4, 4e-3]  # some beyond the clip range of 1e-3, on both sides


def test_the_second_update_on_stale_data_has_the_references_ratios_and_gradient(tables: dict, tiny_model: Path) -> None:
    values = {**ONE_STEP, "learner__learning_rate": 3e-3}
    once, twice = components_with(tables, **values), components_with(tables, **values, learner__inner_epochs=2)
    learner = learner_of(once)
    sampled = stale(sample_round(once, learner.weights()[-1]), SHIFTS)
    first, after = learner.update(sampled.batch, *sampled.trajectories)
    again = learner_of(twice)
    both, _ = again.update(sampled.batch, *sampled.trajectories)

    network = reference_network(tiny_model, after.weights[-1])
    unconditional = reference.text_embedding(tiny_model, "").double()
    setting = reference.Setting(model_alphas(tiny_model), num_steps=4, guidance_scale=3.0, clip_range=1e-3)
    paths = reference_paths(sampled, tiny_model)
    ratios = np.array(reference.ddpo_ratios(network, unconditional, paths, setting))
    assert both["ratio/min"] == pytest.approx(min(first["ratio/min"], ratios.min()), rel=1e-5)
    assert both["ratio/max"] == pytest.approx(max(first["ratio/max"], ratios.max()), rel=1e-5)
    assert 2 * both["ratio/mean"] - first["ratio/mean"] == pytest.approx(ratios.mean(), abs=1e-5)
    clipped = float((np.abs(ratios - 1) > 1e-3).mean())
    assert 2 * both["clip_fraction"] - first["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert clipped != first["clip_fraction"]  # the first update has moved some pairs over the edge
    expected = reference.ddpo_gradient(network, unconditional, paths, setting)
    error = relative_error(gradient_of(again), {name: value.numpy() for name, value in expected.items()})
    print(f"relative error {error:.1e}")
    assert error < 1e-4


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("shifts", "timestep_fraction"),
    [([0.0], 1.0), (SHIFTS, 1.0), (SHIFTS, 0.5)],
    ids=["on_policy", "off_policy", "half_of_the_steps"],
)
def test_the_gradient_of_an_update_is_the_papers_taken_transition_by_transition(
    shifts: list[float], timestep_fraction: float, tables: dict, tiny_model: Path
) -> None:
    components = components_with(
        tables, sampling__num_steps=8, sampling__timestep_fraction=timestep_fraction, **ONE_STEP
    )
    learner = learner_of(components)
    weights = learner.weights()[-1]
    sampled = stale(sample_round(components, weights), shifts)
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert (metrics["clip_fraction"] > 0.2) == (len(shifts) > 1)  # the clip has something to do, or nothing
    setting = reference.Setting(model_alphas(tiny_model), num_steps=8, guidance_scale=3.0, clip_range=1e-3)
    unconditional = reference.text_embedding(tiny_model, "").double()
    network, paths = reference_network(tiny_model, weights), reference_paths(sampled, tiny_model)
    expected = reference.ddpo_gradient(network, unconditional, paths, setting)
    error = relative_error(gradient_of(learner), {name: value.numpy() for name, value in expected.items()})
    print(f"relative error of the gradient: {error:.1e}")
    assert error < 1e-5
    norm = math.sqrt(sum(float((value**2).sum()) for value in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


# Batches of other sizes run other kernels, whose rounding the last step's small deviation magnifies.
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 16])
def test_the_micro_batch_size_does_not_change_the_update(micro_batch_size: int, tables: dict) -> None:
    components = components_with(tables, **ONE_STEP)
    sampled = stale(sample_round(components, learner_of(components).weights()[-1]), SHIFTS)
    expected = gradient_of(updated(tables, sampled))
    error = relative_error(gradient_of(updated(tables, sampled, learner__micro_batch_size=micro_batch_size)), expected)
    print(f"relative error at micro_batch_size {micro_batch_size}: {error:.1e}")
    assert error < 3e-5


def test_accumulated_batches_are_one_larger_batch(tables: dict) -> None:
    whole = updated(tables, learner__batch_size=4)
    accumulated = updated(tables, learner__batch_size=1, learner__gradient_accumulation_steps=4)
    assert accumulated.weights()[-1].fingerprint == whole.weights()[-1].fingerprint
    assert whole.state().optimizer.keys() == accumulated.state().optimizer.keys()


def test_two_optimizer_steps_and_two_inner_epochs_are_counted_and_change_the_weights(tables: dict) -> None:
    components = components_with(tables, learner__inner_epochs=2)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    weights = after.weights[-1]
    assert metrics["optimizer_steps"] == 2 * 2  # 8 images, 4 an optimizer step, twice
    steps = {name: value for name, value in learner.state().optimizer.items() if name.endswith("/step")}
    assert {float(value) for value in steps.values()} == {4.0}
    assert weights.policy_version == 1 and weights.fingerprint != sampled.batch.reports[0].fingerprint


def test_before_the_first_optimizer_step_every_ratio_is_one(tables: dict) -> None:
    components = components_with(tables, algorithm__clip_range=1e-4, learner__micro_batch_size=4)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    print(f"ratio/max_abs_log before any update: {metrics['ratio/max_abs_log']:.1e}")
    assert metrics["ratio/max_abs_log"] <= 0.01 * 1e-4
    assert metrics["ratio/max"] > 1 + 1e-4  # the second optimizer step is no longer on the policy that sampled


def test_in_bfloat16_at_most_a_hundredth_of_transitions_is_clipped_at_the_start(tables: dict) -> None:
    values = {**ONE_STEP, "policy__dtype": "bfloat16", "algorithm__clip_range": 1e-4}
    components = components_with(tables, **values)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    weights = after.weights[-1]
    print(f"bfloat16: {metrics['clip_fraction']:.1%} outside, largest |log ratio| {metrics['ratio/max_abs_log']:.1e}")
    assert metrics["clip_fraction"] <= 0.01
    assert weights.fingerprint != sampled.batch.reports[0].fingerprint


def test_in_float16_a_step_that_overflows_is_skipped_and_counted(tables: dict) -> None:
    components = components_with(tables, policy__dtype="float16", sampling__batches_per_round=1)
    learner = learner_of(components)
    state = learner.state()
    learner.load_state(dataclasses.replace(state, scaler={**state.scaler, "scale": 2.0**100}))
    before = learner.weights()[-1]
    sampled = sample_round(components, before)
    metrics, after = learner.update(sampled.batch, *sampled.trajectories)
    weights = after.weights[-1]
    assert metrics["optimizer_steps"] == metrics["optimizer_steps_skipped"] == 1
    assert weights.policy_version == 1 and weights.fingerprint == before.fingerprint
    assert learner.state().scaler["scale"] == 2.0**99
    calm = learner_of(components)
    assert calm.update(sampled.batch, *sampled.trajectories)[0]["optimizer_steps_skipped"] == 0


def test_the_norm_of_the_gradient_is_limited(tables: dict) -> None:
    free = gradient_of(updated(tables))
    norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in free.values()))
    held = gradient_of(updated(tables, learner__max_grad_norm=norm / 4))
    assert relative_error({name: value * 4 for name, value in held.items()}, free) < 1e-4


@pytest.mark.rotated(every=3, group="resumed")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_learner_that_resumes_from_a_state_arrives_at_the_same_bits(dtype: str, tables: dict) -> None:
    components = components_with(tables, max_policy_lag=1, policy__dtype=dtype, sampling__num_steps=2)
    learner = learner_of(components)
    first = sample_round(components, learner.weights()[-1], round_index=0)
    learner.update(first.batch, *first.trajectories)
    state = learner.state()
    second = sample_round(components, learner.weights()[0], round_index=1)
    expected_metrics, after = learner.update(second.batch, *second.trajectories)
    expected = after.weights[-1]

    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(state)
    assert [weights.fingerprint for weights in resumed.weights()] == [weights.fingerprint for weights in state.weights]
    metrics, after = resumed.update(second.batch, *second.trajectories)
    weights = after.weights[-1]
    assert weights.policy_version == expected.policy_version == 2
    assert weights.fingerprint == expected.fingerprint
    assert {**metrics, "seconds/learn": 0} == {**expected_metrics, "seconds/learn": 0}
    for name, value in learner.state().optimizer.items():
        assert np.array_equal(value, resumed.state().optimizer[name]), name


def test_a_state_is_a_copy_that_later_updates_do_not_change(tables: dict) -> None:
    components = components_with(tables, **ONE_STEP)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    learner.update(sampled.batch, *sampled.trajectories)
    state = learner.state()
    before = {name: value.copy() for name, value in state.optimizer.items()}
    again = sample_round(components, learner.weights()[-1], round_index=1)
    learner.update(again.batch, *again.trajectories)
    assert all(np.array_equal(value, before[name]) for name, value in state.optimizer.items())
    assert any(not np.array_equal(value, before[name]) for name, value in learner.state().optimizer.items())


def test_the_first_weights_are_a_function_of_the_recipes_seed(tables: dict) -> None:
    def first_fingerprint(seed: int) -> str:
        components = components_with(tables, seed=seed)
        return Learner(components.policy, components.algorithm, components.recipe).weights()[-1].fingerprint

    torch.manual_seed(123)
    first = first_fingerprint(0)
    torch.manual_seed(321)
    assert first_fingerprint(0) == first != first_fingerprint(1)


@pytest.mark.parametrize("lag", [0, 1])
def test_as_many_versions_are_kept_as_the_lag_may_ask_for(lag: int, tables: dict) -> None:
    components = components_with(tables, max_policy_lag=lag, sampling__num_steps=2, **ONE_STEP)
    learner = learner_of(components)
    for round_index in range(3):
        sampled = sample_round(components, learner.weights()[0 if round_index else -1], round_index)
        learner.update(sampled.batch, *sampled.trajectories)
    assert [weights.policy_version for weights in learner.weights()] == list(range(3 - lag, 4))


@pytest.fixture
def refusing(tables: dict) -> tuple[Learner, SampledRound]:
    components = components_with(tables, **ONE_STEP)
    learner = learner_of(components)
    return learner, sample_round(components, learner.weights()[-1])


def test_a_trajectory_sampled_with_other_weights_is_refused(refusing: tuple[Learner, SampledRound]) -> None:
    learner, sampled = refusing
    known = learner.weights()[-1].fingerprint
    text = f"task 0 of round 0 was sampled with weights 0123456789ab, and version 0 is {known[:12]}"
    with pytest.raises(RuntimeError, match=text):
        learner.update(sampled.with_reports(fingerprint="0123456789abcdef"), *sampled.trajectories)
    assert learner.weights()[-1].fingerprint == known


def test_a_trajectory_of_a_version_that_is_no_longer_kept_is_refused(refusing: tuple[Learner, SampledRound]) -> None:
    learner, sampled = refusing
    learner.update(sampled.batch, *sampled.trajectories)
    with pytest.raises(RuntimeError, match=r"was sampled with version 0, and the learner keeps \[1\]"):
        learner.update(sampled.batch, *sampled.trajectories)


def test_a_sampler_that_did_not_load_every_parameter_is_refused(refusing: tuple[Learner, SampledRound]) -> None:
    learner, sampled = refusing
    with pytest.raises(RuntimeError, match="task 0 of round 0: its sampler has loaded 63 of 64 parameters"):
        learner.update(sampled.with_reports(num_loaded_params=63), *sampled.trajectories)


def test_a_micro_batch_that_does_not_divide_the_transitions_is_refused_at_the_start(
    tables: dict, tmp_path: Path
) -> None:
    from tests.tiny_pipeline import save_tiny_pipeline

    model = save_tiny_pipeline(tmp_path / "model", set_alpha_to_one=True)  # the last of 4 steps has no noise
    with pytest.raises(ValueError, match="4 images × 3 trained steps = 12 transitions, which .* = 8 does not divide"):
        components_with({**tables, "policy": {**tables["policy"], "model": str(model)}})


def test_the_kl_to_the_pretrained_model_is_that_of_both_policies_transitions(tables: dict) -> None:
    values = {"learner__batch_size": 8, "learner__micro_batch_size": 32, "rounds": 4}  # all pairs are looked at
    evaluated, others = (components_with(tables, **values, evaluation__every=every) for every in (1, 0))
    learner, unwatched = learner_of(evaluated), learner_of(others)
    sampled = sample_round(evaluated, learner.weights()[-1])
    metrics, state = learner.update(sampled.batch, *sampled.trajectories)
    without, same = unwatched.update(sampled.batch, *sampled.trajectories)
    assert same.trained.fingerprint == state.trained.fingerprint and "kl_reference_nats" not in without
    policy = evaluated.policy.load("cpu", evaluated.recipe.sampling, "learner")
    load_weights(policy.network, state.trained)
    found = []
    with torch.no_grad():
        for trajectory in sampled.trajectories:
            rows = select_rows(trajectory.conditioning, trajectory.prompt_index)
            for place in range(trajectory.steps.shape[1]):
                arguments = trajectory.latents[:, place], trajectory.steps[:, place], rows
                present = policy.transition(*arguments)
                with reference_policy(policy.network):
                    pretrained = policy.transition(*arguments)
                moved = (present.mean - pretrained.mean).flatten(1).square().sum(1)
                found.append(moved / (2 * present.std**2))
    assert metrics["kl_reference_nats"] == pytest.approx(float(torch.cat(found).mean()), rel=1e-4)
