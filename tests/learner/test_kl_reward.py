"""The KL of a trajectory to the pretrained model, subtracted from the reward: by hand, in a run, and where refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.diffusion.network_calls import calls_per_image
from ray_ddpo.common.diffusion.path_kl import PathKL, refuse_without_adapters
from ray_ddpo.common.diffusion.rollout import sample_trajectories
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.schedule import round_tasks
from ray_ddpo.common.trajectory import Rollout, Scores
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.algorithms import ALGORITHMS
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer
from ray_ddpo.train import run_training
from tests.accepted_page import assert_refused
from tests.learner.test_algorithms import Toy
from tests.reference import ddpo_reference as reference
from tests.rounds import components_with, moved, sampler_of
from tests.tiny_families import KEYS, MAKERS
from tests.tiny_policy import SAMPLING, tiny_policy

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


def slow_path_kl(policy, trajectory, row: int, places: list[int]) -> float:
    """Return Σ ‖μ_θ − μ_pretrained‖² / (2σ²) over these steps of an image, in float64."""
    total = 0.0
    rows = {
        name: value if name.startswith("negative_") else value[[row]] for name, value in trajectory.conditioning.items()
    }
    for place in places:
        latents, step = trajectory.latents[row, [place]], trajectory.steps[row, [place]]
        with torch.no_grad():
            now = policy.transition(latents, step, rows)
            for layer in policy.network.modules():
                if hasattr(layer, "enable_adapters") and hasattr(layer, "lora_A"):
                    layer.enable_adapters(False)
            before = policy.transition(latents, step, rows)
            for layer in policy.network.modules():
                if hasattr(layer, "enable_adapters") and hasattr(layer, "lora_A"):
                    layer.enable_adapters(True)
        total += reference.gaussian_kl(now.mean.numpy(), before.mean.numpy(), float(now.std))
    return total


@pytest.mark.parametrize("window", [None, range(1, 3)])
def test_the_kl_of_a_path_is_the_sum_over_its_stochastic_steps(window: range | None, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    path_kl = PathKL(policy)
    trajectory = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, window, path_kl=path_kl)
    plain = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, window)
    assert torch.equal(trajectory.latents, plain.latents) and torch.equal(trajectory.log_probs, plain.log_probs)
    places = list(range(trajectory.steps.shape[1]))
    expected = [slow_path_kl(policy, trajectory, row, places) for row in range(2)]
    assert min(expected) > 0.1
    assert path_kl.nats() == pytest.approx(expected, rel=1e-4)


def test_it_is_subtracted_from_the_aggregated_reward_by_hand() -> None:
    algorithm = build(ALGORITHMS, {"name": "grpo"}, "algorithm")
    rewards = {"a": np.array([1.0, 2.0, 3.0, 4.0]), "b": np.array([0.0, 1.0, 0.0, 0.0])}
    path_kl = np.array([0.0, 30.0, 20.0, 10.0])
    aggregation = RewardAggregation({"a": 1.0, "b": 2.0}, kl_reward=0.1)
    prompts = ["cat"] * 4
    _, found = aggregation.compute_advantages(algorithm, {}, prompts, rewards, 4, path_kl)
    shaped = np.array([1.0, 4.0 - 3.0, 3.0 - 2.0, 4.0 - 1.0])  # [1, 1, 1, 3]: the mean is 1.5
    np.testing.assert_allclose(found.advantages, (shaped - 1.5) / (shaped.std() + 1e-4))


def test_dropped_images_take_their_kl_with_them(tables: dict) -> None:
    """Check the advantages of a round whose first group was dropped, with reports as a sampler makes them."""
    keys = {"prompts__images_per_prompt": 2, "sampling__kl_reward": 0.5}
    components = components_with({**tables, "algorithm": {"name": "grpo"}}, **keys)
    rollouts, kls = [], []
    weights = moved(fresh_weights(components))
    for task in round_tasks(components.recipe, 0, components.prompts.load()):
        report, trajectory, images = sampler_of(components).sample(task, weights)
        again, _, _ = sampler_of(components).sample(task, weights)
        assert report.path_kl == again.path_kl and len(report.path_kl) == 4 and min(report.path_kl) > 0
        rewards = np.arange(4.0)
        if not rollouts:
            rewards[1] = np.nan
        dropped = {} if rollouts else {1: "NaN"}
        rollouts.append(Rollout(report, Scores({"jpeg_compressibility": rewards}, 0.0, dropped), trajectory, images))
        kls += report.path_kl
    buffer = RoundBuffer(components.algorithm, components.aggregation, 2)
    batch = buffer.train_batch(rollouts)
    assert batch.dropped == (0, 1) and np.isnan(batch.advantages[:2]).all()
    shaped = np.array([2.0, 3.0, 0.0, 1.0, 2.0, 3.0]) - 0.5 * np.array(kls[2:])
    groups = shaped.reshape(3, 2)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(batch.advantages[2:], expected.ravel(), rtol=1e-9)


def fresh_weights(components) -> PolicyWeights:
    return Learner(components.policy, components.algorithm, components.recipe).weights()[-1]


@pytest.mark.thorough
def test_a_run_logs_it_stores_it_and_resumes_with_the_same_bits(tables: dict) -> None:
    table = {**tables, "rounds": 2, "sampling": {**tables["sampling"], "kl_reward": 0.1}}
    table |= {"learner": {**tables["learner"], "learning_rate": 1e-3}, "checkpoint": {"every": 1}}
    recipe = Recipe.parse({**table, "name": "whole"})
    run_training(recipe, serial=True)
    lines = [json.loads(line) for line in (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["reward/path_kl_nats"] == 0.0 < lines[1]["reward/path_kl_nats"]  # fresh adapters change nothing
    kls = Ledger(Storage(recipe.run_path()), recipe.rollouts).read(1).column("path_kl_nats").to_numpy()
    assert lines[1]["reward/path_kl_nats"] == pytest.approx(kls.mean()) and kls.min() > 0
    first = Recipe.parse({**table, "name": "parts", "rounds": 1})
    run_training(first, serial=True)
    run_training(Recipe.parse({**table, "name": "parts"}), serial=True, resume=True)
    found = [
        Ledger(Storage(each.run_path()), each.rollouts).read(1).column("advantage").to_pylist()
        for each in (recipe, first)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.thorough) for name in ("sd3", "flux")])
def test_flow_families_have_it_too(family: str, tmp_path: Path) -> None:
    keys = {"model": str(MAKERS[family](tmp_path)), **KEYS[family]}
    components = components_with(
        {
            "name": "tiny", "rounds": 1, "policy": {"name": family, **keys}, "prompts": {"name": "animals"},
            "sampling": {"num_steps": 4, "batch_size": 2, "batches_per_round": 1, "kl_reward": 1.0},
            "reward": {"name": "jpeg_compressibility"}, "algorithm": {"name": "ddpo_is"},
            "learner": {"batch_size": 2, "micro_batch_size": "auto"},
        }
    )  # fmt: skip
    (task,) = round_tasks(components.recipe, 0, components.prompts.load())
    fresh = fresh_weights(components)
    assert sampler_of(components).sample(task, fresh)[0].path_kl == (0.0, 0.0)
    assert min(sampler_of(components).sample(task, moved(fresh))[0].path_kl) > 0


@pytest.mark.parametrize(
    ("situation", "keys"),
    [
        ('`sampling.kl_reward` with `policy.train = "full"`', {"policy": {"train": "full"}}),
        ("`sampling.kl_reward` with merged adapters", {"policy": {"merge_adapters": True}}),
        ("`sampling.kl_reward` with a compiled sampler", {"policy": {"compile": "sampler"}}),
        (
            "`sampling.kl_reward` where every step is deterministic",
            {"sampling": {"solver": "dpmsolver++"}, "algorithm": {"name": "rwr"}},
        ),
        (
            "`sampling.kl_reward` with an algorithm on differentiable rewards",
            {"sampling": {"backprop_steps": 1}, "algorithm": {"name": "draft"}},
        ),
        ('`sampling.kl_reward` with `aggregation.kind = "advantages"`', {"aggregation": {"kind": "advantages"}}),
    ],
)
def test_what_cannot_work_is_refused(situation: str, keys: dict, tables: dict) -> None:
    changed = {**tables, "sampling": {**tables["sampling"], "kl_reward": 0.1}}
    for name, more in keys.items():
        changed[name] = {**changed.get(name, {}), **more} if name != "algorithm" else more
    with pytest.raises(ValueError) as error:
        components_of(Recipe.parse(changed))
    assert_refused(situation, str(error.value))


def test_stochastic_steps_count_twice(tables: dict) -> None:
    plain = Recipe.parse(tables)
    asked = Recipe.parse({**tables, "sampling": {**tables["sampling"], "kl_reward": 0.1}})
    steps = plain.sampling.num_steps
    assert (calls_per_image(plain, None), calls_per_image(asked, None)) == (steps, 2 * steps)
    assert calls_per_image(asked, range(1, 3)) - calls_per_image(plain, range(1, 3)) == 2


def test_a_family_of_ones_own_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling.kl_reward is above 0, and the network of Toy has no LoRA adapters"):
        refuse_without_adapters(Toy())
