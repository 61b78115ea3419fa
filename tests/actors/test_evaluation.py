"""Evaluation: images that no training and no tuning ever saw, the same each time."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.actors.evaluation.eval_set import build_eval_set, sample_eval_images
from ray_ddpo.common.prompts import Animals, PromptFunction
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import EvaluationTable
from ray_ddpo.common.schedule import round_tasks
from tests.tiny_policy import SAMPLING, tiny_policy


def test_of_many_prompts_some_are_taken_at_equal_distances() -> None:
    prompts = tuple(f"prompt {number}" for number in range(10))
    chosen = build_eval_set(EvaluationTable(images=4, prompts=prompts), Animals())
    assert [prompt.text for prompt in chosen.prompts] == ["prompt 0", "prompt 2", "prompt 5", "prompt 7"]


def test_seeds_of_training_tuning_and_evaluation_are_never_the_same(tables: dict) -> None:
    seeds: dict[str, set[int]] = {"training": set(), "evaluation": set(), "tuning": set()}
    for run_seed in (0, 1, 7):
        recipe = Recipe.parse({**tables, "seed": run_seed, "rounds": 40})
        for round_index in range(recipe.rounds):
            tasks = round_tasks(recipe, round_index, Animals().load())
            seeds["training"] |= {seed for task in tasks for seed in task.seeds}
        for split in ("evaluation", "tuning"):
            table = EvaluationTable(images=200, seed=run_seed, split=split)
            seeds[split] |= set(build_eval_set(table, Animals()).seeds)
    assert {name: len(values) for name, values in seeds.items()} == {
        "training": 3 * 40 * 8,
        "evaluation": 600,
        "tuning": 600,
    }
    assert len(set.union(*seeds.values())) == sum(len(values) for values in seeds.values())


def test_the_sources_prompts_are_taken_in_order_until_there_are_enough() -> None:
    animals = Animals().listed()
    chosen = build_eval_set(EvaluationTable(images=47), Animals())
    assert [prompt.text for prompt in chosen.prompts] == [*animals, *animals[:2]]
    assert len(set(chosen.seeds)) == 47


def test_prompts_named_in_the_recipe_come_instead_of_the_sources() -> None:
    chosen = build_eval_set(EvaluationTable(images=3, prompts=("a cat", "a dog")), Animals())
    assert [prompt.text for prompt in chosen.prompts] == ["a cat", "a dog", "a cat"]


def test_prompts_of_a_function_are_sampled_the_same_and_keep_their_metadata() -> None:
    source = PromptFunction(path="tests.user_functions:colour_prompt")
    first, again = (build_eval_set(EvaluationTable(images=12), source) for _ in range(2))
    tuning = build_eval_set(EvaluationTable(images=12, split="tuning"), source)
    assert first == again and first.prompts != tuning.prompts
    assert all(prompt.metadata["colour"] in prompt.text for prompt in first.prompts)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_images_do_not_depend_on_the_batch_size(batch_size: int, tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    table = EvaluationTable(images=5, prompts=("a cat", "a dog"))
    whole = sample_eval_images(policy, build_eval_set(table, Animals()), SAMPLING)
    parts = sample_eval_images(
        policy, build_eval_set(table.model_copy(update={"batch_size": batch_size}), Animals()), SAMPLING
    )
    # Latents agree to a few 1e-6, which may push a value over a rounding edge here and there, never further.
    difference = np.abs(whole.astype(int) - parts.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001
    assert not np.array_equal(whole[0], whole[2])  # the same prompt from another seed


def test_prompts_that_the_source_leaves_out_come_before_those_that_are_trained_on() -> None:
    chosen = build_eval_set(EvaluationTable(images=3), Animals(held_out_prompts=("deer", "bear")))
    assert [prompt.text for prompt in chosen.prompts] == ["deer", "bear", "deer"]
    named = build_eval_set(EvaluationTable(images=2, prompts=("dune",)), Animals(held_out_prompts=("deer",)))
    assert [prompt.text for prompt in named.prompts] == ["dune", "dune"]


def test_its_tasks_are_the_set_in_order_behind_what_the_round_trains_on(tables: dict) -> None:
    recipe = Recipe.parse(tables)
    chosen = build_eval_set(EvaluationTable(images=5, batch_size=2, prompts=("a cat", "a dog")), Animals())
    tasks = chosen.tasks(3, 4, 6, recipe.sampling)
    assert len(tasks) == chosen.num_tasks == 3 and [task.index for task in tasks] == [6, 7, 8]
    assert sum((task.seeds for task in tasks), ()) == chosen.seeds
    assert sum((task.prompts for task in tasks), ()) == chosen.prompts
    assert all(task.policy_version == 3 and not task.trains for task in tasks)
    of_round = [[task.place for task in round_tasks(recipe, round_index, Animals().load())] for round_index in (4, 5)]
    assert max(of_round[0]) < tasks[0].place < tasks[-1].place < min(of_round[1])
