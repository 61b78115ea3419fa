"""Full fine-tuning: bf16 autocast over float32 master weights, samplers of equal numerics, averages of versions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.lora.adapters import read_weights, trained_parameters
from ray_ddpo.common.diffusion.memory.sizes import parameter_bytes
from ray_ddpo.common.diffusion.policy import Role, select_rows
from ray_ddpo.common.policy_weights import averaged
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint
from ray_ddpo.learner.learner import Learner
from ray_ddpo.train import run_training
from tests.rounds import components_with, sample_round
from tests.tiny_policy import SAMPLING, tiny_policy

FULL = {"policy__train": "full", "learner__learning_rate": 1e-5}
HALF = {**FULL, "policy__dtype": "bfloat16"}


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.eight_bit)])
def test_in_bfloat16_weights_gradients_and_optimizer_state_are_float32(optimizer: str, tables: dict) -> None:
    components = components_with(tables, **HALF, learner__optimizer=optimizer, learner__weight_decay=0)
    learner = Learner(components.policy, components.algorithm, components.recipe)
    before = learner.weights()[-1]
    sampled = sample_round(components, before)
    metrics, state = learner.update(sampled.batch, *sampled.trajectories)
    floats = {value.dtype for value in state.optimizer.values()} - {np.dtype("uint8"), np.dtype("int64")}
    assert floats == {np.dtype("float32")} and metrics["grad_norm"] > 0
    old, new = before.arrays(), state.trained.arrays()
    still = [name for name in old if np.array_equal(old[name], new[name])]
    assert still == []  # without decay only a gradient moves a parameter
    in_half = [torch.from_numpy(weights.buffer.copy()).bfloat16() for weights in (before, state.trained)]
    kept = float((in_half[0] == in_half[1]).float().mean())
    print(f"{optimizer}: {kept:.1%} of the numbers would not have moved in bfloat16")
    assert kept > 0.5


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("micro_batch_size", [4, 16])
def test_in_bfloat16_sampler_and_learner_compute_the_same(micro_batch_size: int, tables: dict) -> None:
    values = {**HALF, "sampling__batch_size": 8, "sampling__batches_per_round": 1, "learner__batch_size": 8}
    components = components_with(
        tables, **values, learner__micro_batch_size=micro_batch_size, algorithm__clip_range=1e-4
    )
    learner = Learner(components.policy, components.algorithm, components.recipe)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    print(f"micro-batches of {micro_batch_size}: largest |log ratio| {metrics['ratio/max_abs_log']:.1e}")
    assert metrics["ratio/max_abs_log"] == 0.0 and metrics["clip_fraction"] == 0.0


def test_a_sampler_keeps_float32_norms_because_norms_in_bfloat16_would_move_the_ratio(tiny_model: Path) -> None:
    sampler, learner, rounded = (
        tiny_policy(tiny_model, role, train="full", dtype="bfloat16") for role in ("sampler", "learner", "sampler")
    )
    weights = read_weights(learner.network, 1)
    for policy in (sampler, rounded):
        policy.load_weights(weights)
    stored = {name: value.dtype for name, value in sampler.network.named_parameters()}
    assert {name for name, dtype in stored.items() if dtype == torch.float32} == {
        name for name in stored if "norm" in name
    }
    rounded.network.bfloat16()
    conditioning = select_rows(sampler.encode(["a cat", "a dog"]), torch.arange(2))
    latents = torch.randn(2, *sampler.latent_shape, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 2])
    with torch.no_grad():
        means = [policy.transition(latents, steps, conditioning).mean for policy in (sampler, learner, rounded)]
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("role", ["sampler", "learner"])
def test_a_plan_counts_gradients_and_optimizer_state_for_the_learner_only(role: Role, tables: dict) -> None:
    components = components_with(tables, **FULL)
    policy: Any = components.policy.load("cpu", SAMPLING, role)
    sizes = plan_of(components.recipe).sizes
    network = parameter_bytes(policy.network)
    if role == "learner":
        assert sizes.learner.fixed >= 4 * network  # weights, gradients, two moments
        return
    held = network + sum(parameter_bytes(part) for part in (policy.vae, *policy.text_encoders))
    assert held <= sizes.sampling.fixed < held + 0.1 * network
    assert all(value.grad is None for value in trained_parameters(policy.network).values())


def test_the_moving_average_of_full_networks_is_sampled_with_and_resumed(tables: dict) -> None:
    evaluation = {"every": 1, "images": 4, "batch_size": 4, "ema_decay": 0.5}
    values = {**FULL, "learner__learning_rate": 1e-3, "checkpoint__every": 1, "checkpoint__keep": 9}
    components = components_with({**tables, "rounds": 2, "evaluation": evaluation}, **values)
    run_training(components.recipe, serial=True)
    folder = RunFolder(components.recipe.run_path())
    first, second = (load_checkpoint(folder.checkpoints.folder(f"round-{done:06d}")) for done in (1, 2))
    start = Learner(components.policy, components.algorithm, components.recipe).weights()[-1]
    expected = averaged(averaged(start, first.learner.trained, 0.5), second.learner.trained, 0.5)
    average = second.evaluation.average
    assert average is not None and average.fingerprint == expected.fingerprint != second.learner.trained.fingerprint
    reward = [figures["scores"]["reward"] for figures in EvalLog(folder.storage).entries()]
    assert len(reward) == 3 and reward[0]["average_mean"] == reward[0]["mean"]
    assert reward[2]["average_mean"] != reward[2]["mean"]
