"""Operations per image: by hand, against real passes, and in a run's metrics."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_ddpo.common.diffusion.memory.network_work import NetworkWork, count_operations
from ray_ddpo.common.diffusion.network_calls import calls_per_image
from ray_ddpo.common.diffusion.rollout import SharedPrefix, sample_trajectories
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.driver.round_work import column_passes, counted_work, image_work, round_load
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.reference_passes import Update
from ray_ddpo.learner.round_data.transitions import optimizer_steps
from ray_ddpo.train import run_training

ROW = NetworkWork(branches=2, forward=100, both=213, decoding=50)


def with_changes(tables: dict, **changes: Any) -> Recipe:
    return Recipe.parse(
        {key: {**tables.get(key, {}), **value} for key, value in changes.items()}
        | {key: value for key, value in tables.items() if key not in changes}
    )


def work_of(recipe: Recipe, row: NetworkWork | None = ROW) -> Any:
    components = build_components(recipe)
    sizes = components.policy.sizes(recipe.sampling, "cpu")
    return image_work(components, replace(sizes, work=row))


def test_an_image_costs_its_steps_and_its_transitions_in_both_branches(tables: dict) -> None:
    work = work_of(Recipe.parse(tables))  # 4 steps, all trained on once
    assert work.sampling == 2 * 4 * 100 + 50
    assert work.learning == 2 * 4 * 213
    assert work.is_counted


def test_inner_epochs_checkpointing_and_columns_cost_more(tables: dict) -> None:
    twice = work_of(with_changes(tables, learner={"inner_epochs": 2}, policy={"gradient_checkpointing": True}))
    assert twice.learning == 2 * 2 * 4 * (213 + 100)
    # A KL to the pretrained model: one forward pass for each transition.
    grpo = work_of(
        with_changes(
            tables, algorithm={"name": "grpo", "kl_coef": 0.1, "clip_range": 1e-3}, prompts={"images_per_prompt": 4}
        )
    )
    assert grpo.learning == 2 * 4 * (213 + 100)
    # Two optimizer steps a round: proximal log-probs for the second one only.
    proximal = work_of(with_changes(tables, algorithm={"off_policy": {"ratio": "proximal"}}))
    assert proximal.learning == 2 * 4 * (213 + 100 / 2)


def test_only_images_that_are_learned_from_count(tables: dict) -> None:
    sparse = {"name": "rwr_sparse", "percentile": 90}
    recipe = Recipe.parse(tables | {"algorithm": sparse, "learner": {"batch_size": 4}})
    components = build_components(recipe)
    per_image = components.algorithm.noised_samples_per_image
    assert work_of(recipe).learning == pytest.approx(0.1 * 2 * per_image * 213)


def test_a_family_that_cannot_be_counted_has_the_stated_proportion(tables: dict) -> None:
    work = work_of(Recipe.parse(tables), row=None)
    assert work.learning / work.sampling == pytest.approx(2.13) and not work.is_counted


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("ratio", ["proximal", "behavior"])
@pytest.mark.parametrize("lag", [0, 1])
def test_passes_for_columns_are_as_many_as_the_learner_precomputes(
    tables: dict, epochs: int, ratio: str, lag: int
) -> None:
    off_policy = {"ratio": ratio, "max_drift_nats": 1.0}
    changed = with_changes(tables, algorithm={"off_policy": off_policy}, learner={"inner_epochs": epochs})
    recipe = changed.model_copy(update={"max_policy_lag": lag})
    algorithm = build_components(recipe).algorithm
    assert algorithm.columns == {"behavior_means"} | ({"proximal_log_probs"} if ratio == "proximal" else set())
    items: Any = SimpleNamespace(num_images=8, positions=lambda epoch: range(4))
    order = torch.arange(8).numpy()
    steps = [optimizer_steps(order, 4, (), range(4)) for _ in range(epochs)]
    update = object.__new__(Update)  # without trajectories and weights, which `steps` does not read
    for name, value in {"items": items, "epochs": steps, "process_group": ProcessGroup()}.items():
        object.__setattr__(update, name, value)
    own = {"proximal_log_probs": True, "behavior_means": lag == 0}
    asked = sum(len(each) for column in algorithm.columns for each in update.steps(own[column]))
    assert column_passes(algorithm, recipe) == asked / (8 * 4)


def test_a_counted_forward_pass_is_that_of_the_loaded_network(recipe: Recipe) -> None:
    components = build_components(recipe)
    work = components.policy.sizes(recipe.sampling, "cpu").work
    assert work is not None and work.branches == 2
    policy = components.policy.load("cpu", recipe.sampling, "sampler")
    conditioning = policy.encode(["a cat"])
    latents, steps = torch.zeros(1, *policy.latent_shape), torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's fused kernel
        with torch.no_grad():
            assert count_operations(lambda: policy.transition(latents, steps, conditioning)) == 2 * work.forward
            assert count_operations(lambda: policy.decode(latents)) == work.decoding > 0
        loss = policy.transition(latents, steps, conditioning).mean.sum()
        assert work.forward + count_operations(loss.backward) / 2 == pytest.approx(work.both, rel=0.02)


def test_a_load_has_the_rounds_structure(recipe: Recipe) -> None:
    components = build_components(recipe)
    sizes = replace(components.policy.sizes(recipe.sampling, "cpu"), work=ROW)
    load = round_load(components, sizes, image_work(components, sizes), rate=10.0)
    assert (load.tasks, load.sample, load.learn) == (2, 4 * 85.0, 8 * 170.4)
    assert (load.images_per_step, load.transitions_per_image, load.micro_batch_size, load.lag) == (4, 4, 8, 0)


def test_a_run_logs_its_mfu_from_counted_operations_and_its_own_seconds(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_ddpo.common.machine.matrix_rate", lambda device, dtype: 1e9)
    run_training(recipe, serial=True)
    rounds = [json.loads(line) for line in (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()]
    work = counted_work(build_components(recipe))
    assert work is not None and len(rounds) == 2
    for metrics in rounds:
        assert metrics["mfu/sampler"] == pytest.approx(8 * work.sampling / (metrics["seconds/sample"] * 1e9))
        assert metrics["mfu/learner"] == pytest.approx(8 * work.learning / (metrics["seconds/learn"] * 1e9))


def test_a_family_that_cannot_be_counted_has_no_mfu(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    components = build_components(recipe)

    def sizes(*_: object) -> None:
        raise ValueError("this family has no sizes")

    monkeypatch.setattr(type(components.policy), "sizes", sizes)
    assert counted_work(components) is None
    assert not [name for name in run_training(recipe, serial=True) if name.startswith("mfu/")]


@pytest.mark.parametrize(
    ("sampling", "calls"),
    [  # of 8 steps; the window lies at 4 and 5, or at the first step where there is none
        ({"sde_window": 2, "skip_last_steps": 2}, 8.0),
        ({"sde_window": 2, "skip_last_steps": 2, "shared_prefix": True}, 4 / 4 + 2 + 2),
        ({"sde_window": 2, "skip_last_steps": 2, "shared_prefix": True, "batch_size": 2}, 4 / 2 + 2 + 2),
        ({"sde_window": 2, "skip_last_steps": 2, "cache_interval": 2}, 3 + 2 + 2),  # 0, 1, 3 and 6, 7
        ({"sde_window": 2, "skip_last_steps": 2, "cache_interval": 2, "shared_prefix": True}, 3 / 4 + 2 + 2),
        ({"sde_window": 2, "skip_last_steps": 2, "solver": "dpmsolver++"}, 8.0),
        ({}, 8.0),
    ],
)
def test_saved_calls_are_not_counted(tables: dict, sampling: dict, calls: float) -> None:
    recipe = with_changes(
        tables,
        sampling={"num_steps": 8, "batch_size": 4, "batches_per_round": 4, "sde_window_order": "sliding"} | sampling,
        prompts={"images_per_prompt": 4},
    )
    window = range(4, 6) if "sde_window" in sampling else None
    assert calls_per_image(recipe, window) == calls


def test_the_work_of_an_image_is_the_mean_over_the_positions_of_the_window(tables: dict) -> None:
    sampling = {"sde_window": 1, "sde_window_order": "sliding", "shared_prefix": True}  # 4 steps, at 0, 1, 2, 3
    changes = {"prompts": {"images_per_prompt": 4}, "learner": {"micro_batch_size": 4}}
    recipe = with_changes(tables | {"rounds": 8}, sampling=sampling, **changes)
    work = work_of(recipe)
    assert work.calls == np.mean([4, 3 + 1 / 4, 2 + 2 / 4, 1 + 3 / 4])
    assert work.sampling == 2 * work.calls * 100 + 50
    assert work.sampling_with(4) == 2 * 4 * 100 + 50


def test_the_network_is_called_as_often_as_is_counted(recipe: Recipe, tables: dict) -> None:
    fast = {"num_steps": 8, "sde_window": 2, "cache_interval": 2, "shared_prefix": True}
    recipe = with_changes(tables, sampling=fast, prompts={"images_per_prompt": 4})
    components = build_components(recipe)
    policy = components.policy.load("cpu", recipe.sampling, "sampler")
    rows, predict = [], policy.predict

    def counting(latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows.append(len(latents))
        return predict(latents, *arguments)

    policy.predict = counting  # type: ignore[method-assign]
    sample_trajectories(
        policy, ["a cat"] * 4, [1, 2, 3, 4], recipe.sampling, range(4, 6), SharedPrefix((1, 1, 1, 1), groups=1)
    )
    assert sum(rows) / 4 == calls_per_image(recipe, range(4, 6))
