"""Runs with a shared prefix, cached steps, another solver or 8-bit weights: equal bits, a true ledger, clear refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_ddpo import cli
from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.actors.task_care import Care
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.schedule import Task, round_tasks
from ray_ddpo.deploy.driver.components import build_components
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import eval_identity
from ray_ddpo.learner.learner import Learner
from ray_ddpo.train import run_training
from tests.rounds import components_with, moved

WINDOW = {"sampling__num_steps": 6, "sampling__sde_window": 2, "learner__micro_batch_size": 4}
SIX_STEPS = {"sampling__num_steps": 6, "learner__micro_batch_size": 4}
BRANCHED = {**WINDOW, "sampling__shared_prefix": "true", "prompts__images_per_prompt": 2}


def run_of(tables: dict, **values: Any) -> tuple[Recipe, RunFolder]:
    recipe = components_with({"checkpoint": {"every": 1, "keep": 3}, **tables}, **values).recipe
    run_training(recipe, serial=True)
    return recipe, RunFolder(recipe.run_path())


def at_version_0(task: Task) -> Task:
    return dataclasses.replace(task, policy_version=0)


def test_a_groups_prefix_begins_with_the_noise_of_its_first_image(tables: dict) -> None:
    components = components_with(tables, **{**BRANCHED, "prompts__images_per_prompt": 4})
    for task in round_tasks(components.recipe, 3, components.prompts.load()):
        assert task.prefix_seeds == (task.seeds[0],) * 4 and task.window is not None
    halves = components_with(tables, **{**BRANCHED, "prompts__images_per_prompt": 8})
    first, second = round_tasks(halves.recipe, 3, halves.prompts.load())
    assert first.prefix_seeds == second.prefix_seeds == (first.seeds[0],) * 4
    plain = components_with(tables, **WINDOW)
    assert all(task.prefix_seeds is None for task in round_tasks(plain.recipe, 3, plain.prompts.load()))


def test_halves_of_a_group_begin_their_window_at_the_same_bits(tables: dict) -> None:
    components = components_with(tables, **{**BRANCHED, "prompts__images_per_prompt": 8})
    sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    weights = moved(Learner(components.policy, components.algorithm, components.recipe).weights()[-1])
    tasks = [at_version_0(task) for task in round_tasks(components.recipe, 1, components.prompts.load())]
    assert tasks[0].window.start > 0
    first, second = (sampler.sample(task, weights)[1] for task in tasks)
    assert torch.equal(first.latents[:, 0], second.latents[:, 0])
    assert not torch.equal(first.final_latents, second.final_latents)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("more", [{}, {"sampling__solver": "dpmsolver++"}, {"sampling__cache_interval": 2}], ids=str)
def test_tasks_have_the_same_bits_on_one_sampler_and_on_two(tables: dict, more: dict) -> None:
    components = components_with(tables, **BRANCHED, **more)
    one, *two = (Sampler(components.policy, components.recipe.sampling, components.recipe.runtime) for _ in range(3))
    weights = moved(Learner(components.policy, components.algorithm, components.recipe).weights()[-1])
    tasks = [at_version_0(task) for task in round_tasks(components.recipe, 1, components.prompts.load())]
    in_turn = [one.sample(task, weights)[0].image_fingerprints for task in tasks]
    apart = [sampler.sample(task, weights)[0].image_fingerprints for sampler, task in zip(two, tasks, strict=True)]
    assert in_turn == apart and len(set(in_turn[0] + in_turn[1])) == 8


def test_an_image_that_is_left_out_changes_no_other_of_its_task(tables: dict) -> None:
    components = components_with(tables, **BRANCHED)
    sampler = Sampler(components.policy, components.recipe.sampling, components.recipe.runtime)
    weights = moved(Learner(components.policy, components.algorithm, components.recipe).weights()[-1])
    task = at_version_0(round_tasks(components.recipe, 1, components.prompts.load())[0])
    whole, left = sampler.sample(task, weights), sampler.sample(task, weights, Care(not_sampled=(0, 1)))
    assert torch.equal(whole[1].final_latents[2:], left[1].final_latents[2:])
    assert np.array_equal(whole[2].pixels[2:], left[2].pixels[2:]) and not left[2].pixels[:2].any()


def test_the_ledger_tells_of_a_shared_prefix_and_is_replayed(tables: dict, capsys: pytest.CaptureFixture) -> None:
    recipe, folder = run_of(tables, **BRANCHED)
    ledger = Ledger(folder.storage, recipe.rollouts)
    rows = ledger.read(1).to_pylist()
    assert [row["prefix_seed"] for row in rows] == [rows[number // 2 * 2]["seed"] for number in range(8)]
    assert ledger.about(1)["shared_prefix"] is True
    capsys.readouterr()
    assert cli.main(["replay", folder.location, "--round", "1"]) == 0
    assert capsys.readouterr().out == "round 1, re-sampled with policy version 1: all 8 images are equal\n"
    altered = ledger.read(1)
    rows[5]["prefix_seed"] += 4
    path = Path(folder.location) / "rollouts/round=000001/images.parquet"
    _rewrite(path, rows, altered.schema)
    assert cli.main(["replay", folder.location, "--round", "1"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"image 5: prefix_seed is {rows[5]['prefix_seed']} in the ledger, and "), said


def _rewrite(path: Path, rows: list[dict], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_pylist(rows, schema=schema).drop_columns("round")
    parquet.write_table(table, path)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("more", [{}, {"sampling__solver": "dpmsolver++"}, {"sampling__cache_interval": 2}], ids=str)
def test_a_round_with_a_window_is_replayed(tables: dict, more: dict, capsys: pytest.CaptureFixture) -> None:
    recipe, folder = run_of(tables, **WINDOW, **more)
    assert "prefix_seed" not in Ledger(folder.storage, recipe.rollouts).read(1).column_names
    assert "shared_prefix" not in Ledger(folder.storage, recipe.rollouts).about(1)
    assert cli.main(["replay", folder.location, "--round", "1"]) == 0, capsys.readouterr().out


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("more", [{"sampling__solver": "dpmsolver++"}, {"sampling__cache_interval": 2}], ids=str)
@pytest.mark.parametrize("name", ["rwr", "diffusion_nft"])
def test_an_algorithm_without_log_probs_takes_fast_steps_without_a_window(tables: dict, name: str, more: dict) -> None:
    tables |= {"algorithm": {"name": name}, "prompts": {"name": "animals", "images_per_prompt": 2}}
    components = components_with(tables, **SIX_STEPS, **more)
    task = round_tasks(components.recipe, 1, components.prompts.load())[0]
    assert task.window == range(1), "the first step's log-prob proves which weights sampled"
    recipe, folder = run_of(tables, **SIX_STEPS, **more)
    metrics = [json.loads(line) for line in Path(folder.location, "metrics.jsonl").read_text().splitlines()]
    assert [row["log_prob_check/max_abs"] for row in metrics] == [0.0, 0.0]


def test_evaluation_has_steps_of_its_own(tables: dict) -> None:
    evaluation = {"every": 2, "images": 4, "batch_size": 4, "prompts": ["cat"]}
    tables |= {"evaluation": evaluation}
    plain, fast = tables | {"name": "plain"}, tables | {"name": "fast"}
    one, _ = run_of(plain)
    other, _ = run_of(fast, evaluation__num_steps=7, evaluation__solver="dpmsolver++")
    logs = [EvalLog(Storage(recipe.run_path())).entries() for recipe in (one, other)]
    assert logs[0][0]["set"] != logs[1][0]["set"], "their images cannot be compared"
    assert logs[0][0]["scores"] != logs[1][0]["scores"]
    assert other.held_out_sampling.num_steps == 7 and one.held_out_sampling.num_steps == 4
    checkpoints = [RunFolder(recipe.run_path()).checkpoints for recipe in (one, other)]
    weights = [sorted(checkpoint.names())[-1] for checkpoint in checkpoints]
    assert weights[0] == weights[1]


def test_the_identity_of_an_evaluation_is_as_before_without_these_keys(tables: dict) -> None:
    from ray_ddpo.actors.evaluation.eval_set import build_eval_set

    identities = []
    for more in ({}, {"evaluation__cache_interval": 1}, {"evaluation__cache_interval": 2}):
        components = components_with(tables, **more)
        chosen = build_eval_set(components.recipe.evaluation, components.prompts)
        identities.append(eval_identity(components.recipe, chosen))
    assert identities[0] == identities[1] != identities[2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a prefix without a window": (
        {"sampling__shared_prefix": "true", "prompts__images_per_prompt": 2},
        "shared_prefix is true and there is no sde_window: every step is stochastic",
    ),
    "a prefix without groups": (
        {**WINDOW, "sampling__shared_prefix": "true"},
        "sampling.shared_prefix is true and prompts.images_per_prompt 1: a group of one image",
    ),
    "a prefix of parts of groups": (
        {**BRANCHED, "sampling__batch_size": 6, "prompts__images_per_prompt": 4, "learner__batch_size": 12},
        "images_per_prompt 4 and sampling.batch_size 6: tasks would hold parts of groups",
    ),
    "a cache and a solver": (
        {**WINDOW, "sampling__cache_interval": 2, "sampling__solver": "dpmsolver++"},
        "cache_interval is 2 and solver 'dpmsolver\\+\\+', which extrapolates",
    ),
    "a cache and a solver in evaluation": (
        {"evaluation__cache_interval": 2, "evaluation__solver": "dpmsolver++"},
        "cache_interval is 2 and solver 'dpmsolver\\+\\+', which extrapolates",
    ),
    "a cache with log-probs of all steps": (
        {"sampling__cache_interval": 2},
        "sampling.cache_interval is 2, and DDPOImportanceSampling learns from the log-probs of all steps",
    ),
    "a solver with log-probs of all steps": (
        {"sampling__solver": "dpmsolver++"},
        "sampling.solver is 'dpmsolver\\+\\+', and DDPOImportanceSampling learns from the log-probs of all steps",
    ),
    "a solver that is not known": ({"sampling__solver": "heun"}, "sampling.solver is 'heun'"),
    "steps that the schedule does not have": (
        {"evaluation__num_steps": 1000},
        "evaluation.num_steps is 1000: sampling.num_steps is 1000: .* would step on timestep 1000",
    ),
    "8-bit weights with a ratio to the sampler's log-probs": (
        {"policy__sampler_storage": "float8_e4m3fn"},
        "sampler_storage 'float8_e4m3fn' and merge_adapters False: sampler and learner then round differently",
    ),
    "8-bit weights and merged adapters": (
        {"policy__sampler_storage": "float8_e4m3fn", "policy__merge_adapters": "true"},
        "sampler_storage is 'float8_e4m3fn' and merge_adapters true: merged adapters would be rounded away",
    ),
    "8-bit weights of a whole network": (
        {"policy__sampler_storage": "float8_e4m3fn", "policy__train": "full"},
        "sampler_storage is 'float8_e4m3fn' and train \"full\": trained weights would be rounded away",
    ),
    "8-bit weights and a compiled sampler": (
        {"policy__sampler_storage": "float8_e4m3fn", "policy__compile": "sampler"},
        "sampler_storage is 'float8_e4m3fn' and compile 'sampler': converting layers are not compiled",
    ),
}


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_is_refused(tables: dict, values: tuple[dict[str, Any], str]) -> None:
    with pytest.raises(ValueError, match=values[1]):
        components_with(tables, **values[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluation": {"num_steps": 7}}, "evaluation.num_steps is 7, and Shapes takes its own steps only"),
        ({"evaluation": {"cache_interval": 2}}, "evaluation.cache_interval is 2, and Shapes takes its own steps only"),
        ({"policy": {"sampler_storage": "float8_e4m3fn"}}, "and Shapes stores weights in one dtype only"),
    ],
)
def test_a_family_with_its_own_steps_only_is_refused(tables: dict, changes: dict, text: str, tmp_path: Path) -> None:
    (tmp_path / "shapes.pt").touch()
    own = {"name": "shapes:Shapes", "model": str(tmp_path / "shapes.pt"), **changes.pop("policy", {})}
    with pytest.raises(ValueError, match=text):
        build_components(Recipe.parse({**tables, "policy": own, **changes}))
