"""The recipe's optimizer: AdamW, or AdamW with 8-bit state; the state is restored to the same bits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.commands.plan.numbers import plan_of
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.optimization.optimizer import load_optimizer_arrays, optimizer_arrays, optimizer_of
from tests.rounds import components_with, sample_round

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
EIGHT_BIT = {"learner__optimizer": "adamw_8bit", "policy__train": "full", "policy__model": "tiny_animals"}


def settings(optimizer: str, **keys: float) -> LearnerTable:
    return LearnerTable.model_validate({"batch_size": 1, "micro_batch_size": 1, "optimizer": optimizer, **keys})


def parameters_of(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{place}": nn.Parameter(torch.randn(shape, generator=generator)) for place, shape in enumerate(shapes)
    }


def learn(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    """Make steps along gradients of a fixed direction with noise, as those of batches are."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for name, parameter in parameters.items():
            mean = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.grad = 0.01 * (mean + torch.randn(parameter.shape, generator=generator))
        optimizer.step()


SHAPES = ((80, 96), (64, 32, 3, 3), (40,))  # the last one is too small for 8 bits


def test_in_float32_it_is_torchs_own_with_the_recipes_numbers() -> None:
    table = settings("adamw", learning_rate=2e-3, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    ours, theirs = parameters_of(*SHAPES), parameters_of(*SHAPES)
    keys = {"lr": 2e-3, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-5, "fused": True}
    learn(optimizer_of(ours, table), ours, range(4))
    learn(torch.optim.AdamW(theirs.values(), **keys), theirs, range(4))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.eight_bit
def test_eight_bits_move_parameters_within_three_hundredths_of_where_float32_does() -> None:
    start, exact, rough = (parameters_of(*SHAPES) for _ in range(3))
    keys = {"learning_rate": 1e-3, "weight_decay": 0.1}
    learn(optimizer_of(exact, settings("adamw", **keys)), exact, range(10))
    learn(optimizer_of(rough, settings("adamw_8bit", **keys)), rough, range(10))
    for name, parameter in start.items():
        moved, moved_too = exact[name] - parameter, rough[name] - parameter
        difference = float((moved_too - moved).detach().norm() / moved.detach().norm())
        print(f"{name}: the moves differ by {difference:.1%}")
        assert difference < (1e-5 if parameter.numel() < 4096 else 0.03)
        assert parameter.numel() < 4096 or difference > 0


@pytest.mark.eight_bit
def test_an_eight_bit_state_is_two_bytes_a_number_and_its_scales() -> None:
    parameters = parameters_of((64, 64))
    optimizer = optimizer_of(parameters, settings("adamw_8bit"))
    learn(optimizer, parameters, range(1))
    arrays = optimizer_arrays(optimizer, parameters)
    codes = [array for array in arrays.values() if array.dtype == np.uint8]
    scales = [array for name, array in arrays.items() if "absmax" in name]
    assert [array.shape for array in codes] == [(64, 64)] * 2
    assert [array.size for array in scales] == [64 * 64 // 256] * 2


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.eight_bit)])
def test_a_state_that_went_through_arrays_leads_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    table, whole, first, second = settings(optimizer), *(parameters_of(*SHAPES) for _ in range(3))
    learn(optimizer_of(whole, table), whole, range(6))
    stopped = optimizer_of(first, table)
    learn(stopped, first, range(3))
    arrays = optimizer_arrays(stopped, first)
    again = optimizer_of(second, table)
    learn(again, second, range(1))  # what it has learned meanwhile is undone
    for name, parameter in second.items():
        parameter.data = first[name].detach().clone()
    load_optimizer_arrays(again, second, arrays)
    learn(again, second, range(3, 6))
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    assert all(np.array_equal(value, optimizer_arrays(stopped, first)[name]) for name, value in arrays.items())


@pytest.mark.eight_bit
def test_parameters_in_channels_last_lead_to_the_same_bits_after_a_resume() -> None:
    def channels_last() -> dict[str, nn.Parameter]:
        parameters = parameters_of((64, 32, 3, 3))
        for parameter in parameters.values():
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return parameters

    table, whole, first, second = settings("adamw_8bit"), *(channels_last() for _ in range(3))
    learn(optimizer_of(whole, table), whole, range(6))
    stopped, again = optimizer_of(first, table), optimizer_of(second, table)
    learn(stopped, first, range(3))
    for name, parameter in second.items():
        parameter.data.copy_(first[name].detach())
    load_optimizer_arrays(again, second, optimizer_arrays(stopped, first))
    learn(again, second, range(3, 6))
    assert torch.equal(whole["layer.0"], second["layer.0"])


def small(tables: dict, **values: object) -> dict:
    keys = {"sampling__num_steps": 3, "sampling__batches_per_round": 1, "learner__learning_rate": 1e-4}
    return {**keys, "learner__micro_batch_size": 4, **EIGHT_BIT, **values}


@pytest.mark.eight_bit
def test_a_learner_with_eight_bits_resumes_from_a_checkpoint_to_the_same_bits(tables: dict, tmp_path: Path) -> None:
    components = components_with(tables, **small(tables))
    learner = Learner(components.policy, components.algorithm, components.recipe)
    first = sample_round(components, learner.weights()[-1], round_index=0)
    _, state = learner.update(first.batch, *first.trajectories)
    assert np.dtype("uint8") in {array.dtype for array in state.optimizer.values()}
    saved = save_checkpoint(Storage(tmp_path / "saved"), Checkpoint(1, state, {}), keep=1, shard_bytes=100_000)
    second = sample_round(components, learner.weights()[-1], round_index=1)
    _, expected = learner.update(second.batch, *second.trajectories)

    resumed = Learner(components.policy, components.algorithm, components.recipe)
    resumed.load_state(load_checkpoint(saved).learner)
    _, found = resumed.update(second.batch, *second.trajectories)
    assert found.trained.fingerprint == expected.trained.fingerprint != state.trained.fingerprint
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, value in expected.optimizer.items():
        assert np.array_equal(found.optimizer[name], value), name


@pytest.mark.eight_bit
def test_the_plan_counts_two_bytes_a_parameter_and_not_eight(tables: dict) -> None:
    recipe = Recipe.load(RECIPES / "sd15_full.toml")
    learner = recipe.learner.model_copy(update={"optimizer": "adamw_8bit"})
    plain, eight = plan_of(recipe), plan_of(recipe.model_copy(update={"learner": learner}))
    assert plain.optimizer_bytes == 8 * 859_520_964
    assert eight.optimizer_bytes == pytest.approx(2 * 859_520_964, rel=0.02)
    assert plain.learner_bytes - eight.learner_bytes == plain.optimizer_bytes - eight.optimizer_bytes
    assert plain.sampler_bytes == eight.sampler_bytes  # it has no optimizer
    components = components_with(tables, **small(tables))
    made = Learner(components.policy, components.algorithm, components.recipe)
    sampled = sample_round(components, made.weights()[-1])
    _, state = made.update(sampled.batch, *sampled.trajectories)
    maps = sum(array.nbytes for name, array in state.optimizer.items() if "qmap" in name)  # one for all, on the device
    held = sum(array.nbytes for array in state.optimizer.values()) - maps
    print(f"{held / plan_of(components.recipe).optimizer_bytes:.3f} of what is planned")
    assert held == pytest.approx(plan_of(components.recipe).optimizer_bytes, rel=0.1)


def test_without_its_library_the_recipe_is_refused_before_anything_is_sampled(
    tables: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"adamw_8bit' needs the package 'bitsandbytes'.*pip install \"ray-ddpo\[8bit\]\""
    ):
        components_with(tables, **EIGHT_BIT)
    assert build_components(components_with(tables).recipe)
    options = ["--learner.optimizer", "adamw_8bit"]
    assert cli.main(["train", str(RECIPES / "demo.toml"), *options]) == 2
    assert "needs the package 'bitsandbytes'" in capsys.readouterr().err
    assert cli.main(["doctor", str(RECIPES / "demo.toml"), *options]) == 1
    assert "needs the package 'bitsandbytes'" in capsys.readouterr().out


def test_another_name_is_refused_with_those_that_there_are(tables: dict) -> None:
    with pytest.raises(ValueError, match="learner.optimizer.*'adamw' or 'adamw_8bit'"):
        components_with(tables, learner__optimizer="lion")
