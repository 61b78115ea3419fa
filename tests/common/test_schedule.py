"""The arithmetic of a run: who samples what under which version, from the recipe alone."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ddpo.common.prompts import Prompt, SamplePrompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.schedule import (
    Stream,
    Task,
    image_seed,
    round_tasks,
    sde_window_of_round,
    transition_order,
)

seeds, rounds, places = st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.integers(0, 10_000)


def numbered(generator: np.random.Generator) -> Prompt:
    return Prompt(f"prompt {generator.integers(1_000_000)}")


def recipe_with(tables: dict, **changes: object) -> Recipe:
    return Recipe.parse({**tables, **changes})


@given(run_seed=seeds, round_index=rounds, image=places)
def test_no_two_purposes_share_a_seed(run_seed: int, round_index: int, image: int) -> None:
    by_stream = {stream: image_seed(run_seed, stream, round_index, image) for stream in Stream}
    assert all(seed % 4 == stream for stream, seed in by_stream.items())  # so disjoint for any two rounds and images


def test_the_seeds_of_training_tuning_evaluation_and_checking_do_not_meet() -> None:
    sampled = {
        stream: {image_seed(0, stream, round_index, image) for round_index in range(40) for image in range(64)}
        for stream in Stream
    }
    assert all(len(of_stream) == 40 * 64 for of_stream in sampled.values())
    assert len(set().union(*sampled.values())) == len(Stream) * 40 * 64


@given(run_seed=seeds, stream=st.sampled_from(Stream), round_index=rounds, image=places)
def test_a_seed_is_one_that_torch_takes(run_seed: int, stream: Stream, round_index: int, image: int) -> None:
    assert 0 <= image_seed(run_seed, stream, round_index, image) < 2**63


@given(run_seed=seeds, other=seeds)
def test_runs_of_other_seeds_sample_other_images(run_seed: int, other: int) -> None:
    same = image_seed(run_seed, Stream.TRAINING, 0, 0) == image_seed(other, Stream.TRAINING, 0, 0)
    assert same == (run_seed == other)


def test_seeds_never_change_because_old_runs_are_sampled_again_from_them() -> None:
    assert image_seed(0, Stream.TRAINING, 0, 0) == 7896617691693857884
    assert image_seed(7, Stream.EVALUATION, 3, 11) == 5255984068897094817


def test_tasks_cut_a_round_in_order_and_every_image_has_its_own_seed(tables: dict) -> None:
    tasks = round_tasks(recipe_with(tables), 5, numbered)
    assert [(task.round, task.index) for task in tasks] == [(5, 0), (5, 1)]
    assert [len(task.seeds) for task in tasks] == [len(task.prompts) for task in tasks] == [4, 4]
    sampled = [seed for task in tasks for seed in task.seeds]
    assert sampled == [image_seed(0, Stream.TRAINING, 5, image) for image in range(8)]


def test_a_cut_into_other_tasks_has_the_same_images(tables: dict) -> None:
    def images(batch_size: int, batches: int) -> list[tuple[Prompt, int]]:
        sampling = {**tables["sampling"], "batch_size": batch_size, "batches_per_round": batches}
        tasks = round_tasks(recipe_with(tables, sampling=sampling), 3, numbered)
        return [pair for task in tasks for pair in zip(task.prompts, task.seeds, strict=True)]

    assert images(4, 2) == images(2, 4) == images(8, 1)


def test_a_group_has_one_prompt_and_different_seeds(tables: dict) -> None:
    tasks = round_tasks(recipe_with(tables, prompts={"name": "animals", "images_per_prompt": 4}), 0, numbered)
    first, second = ({prompt.text for prompt in task.prompts} for task in tasks)
    assert len(first) == len(second) == 1 and first != second
    assert len({seed for task in tasks for seed in task.seeds}) == 8


def test_without_groups_every_image_samples_its_prompt(tables: dict) -> None:
    texts = [prompt.text for task in round_tasks(recipe_with(tables), 0, numbered) for prompt in task.prompts]
    assert len(set(texts)) == 8


def test_rounds_and_run_seeds_have_prompts_of_their_own(tables: dict) -> None:
    def texts(seed: int, round_index: int) -> tuple[str, ...]:
        return tuple(
            prompt.text
            for task in round_tasks(recipe_with(tables, seed=seed), round_index, numbered)
            for prompt in task.prompts
        )

    assert len({texts(0, 0), texts(0, 1), texts(1, 0)}) == 3


def test_a_task_is_a_function_of_recipe_and_round_whatever_was_asked_before(tables: dict) -> None:
    recipe = recipe_with(tables)
    alone = round_tasks(recipe, 7, numbered)
    for round_index in (9, 0, 3):
        round_tasks(recipe, round_index, numbered)
    assert round_tasks(recipe, 7, numbered) == alone


def test_a_prompt_that_takes_more_random_numbers_does_not_shift_later_ones(tables: dict) -> None:
    def greedy(generator: np.random.Generator) -> Prompt:
        prompt = numbered(generator)
        generator.random(generator.integers(1, 9))
        return prompt

    def prompts(sample: SamplePrompt) -> list[Prompt]:
        return [prompt for task in round_tasks(recipe_with(tables), 0, sample) for prompt in task.prompts]

    assert prompts(greedy) == prompts(numbered)


def test_a_tasks_title_says_what_it_is_for() -> None:
    task = Task(12, 3, 11, (Prompt("cat"),), (4,))
    assert task.title == "round 12, task 3 (version 11)"
    looked_at = dataclasses.replace(task, stream=Stream.EVALUATION)
    assert looked_at.title == "evaluation of version 11, task 3"


@pytest.mark.parametrize("lag", [0, 1])
def test_the_tasks_of_a_round_are_sampled_with_its_version(tables: dict, lag: int) -> None:
    for round_index in range(3):
        tasks = round_tasks(recipe_with(tables, max_policy_lag=lag), round_index, numbered)
        assert {task.policy_version for task in tasks} == {max(0, round_index - lag)}


@given(run_seed=seeds, round_index=rounds, inner_epoch=st.integers(0, 9), count=st.integers(1, 200))
def test_an_inner_epoch_takes_every_image_once(run_seed: int, round_index: int, inner_epoch: int, count: int) -> None:
    order = transition_order(run_seed, round_index, inner_epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == transition_order(run_seed, round_index, inner_epoch, count).tolist()


def test_inner_epochs_rounds_and_runs_take_the_images_in_other_orders() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert len({tuple(transition_order(*place, count=64)) for place in places}) == 4


def test_recipe_registry_and_schedule_are_imported_without_torch() -> None:
    modules = "ray_ddpo.common.recipe.recipe, ray_ddpo.common.recipe.registry, ray_ddpo.common.schedule"
    check = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def windowed(tables: dict, **sampling: object) -> Recipe:
    return recipe_with(tables, sampling={**tables["sampling"], "num_steps": 10, **sampling})


def test_without_a_window_all_steps_are_stochastic(recipe: Recipe) -> None:
    assert sde_window_of_round(recipe, 3) is None
    assert all(task.window is None for task in round_tasks(recipe, 3, numbered))


@given(round_index=rounds)
def test_a_window_ends_before_the_skipped_steps_and_is_shared_by_a_round(
    round_index: int,
) -> None:
    tables = {"num_steps": 10, "batch_size": 4, "batches_per_round": 2, "sde_window": 3, "skip_last_steps": 2}
    recipe = Recipe.model_construct(seed=5, sampling=SamplingTable(**tables))
    window = sde_window_of_round(recipe, round_index)
    assert len(window) == 3 and window.start >= 0 and window.stop <= 8
    assert window == sde_window_of_round(recipe, round_index)


def test_a_random_window_comes_to_every_place_and_another_run_has_another_order(tables: dict) -> None:
    recipe, other = windowed(tables, sde_window=4), recipe_with(windowed(tables, sde_window=4).model_dump(), seed=1)
    starts = [sde_window_of_round(recipe, round_index).start for round_index in range(200)]
    assert set(starts) == set(range(7))
    assert starts != [sde_window_of_round(other, round_index).start for round_index in range(200)]
    assert [task.window.start for task in round_tasks(recipe, 9, numbered)] == [starts[9]] * 2


def test_a_sliding_window_moves_every_few_rounds_and_starts_over(tables: dict) -> None:
    recipe = windowed(tables, sde_window=8, sde_window_order="sliding", sde_window_rounds=2)
    assert [sde_window_of_round(recipe, round_index).start for round_index in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"sde_window": 9, "skip_last_steps": 2}, "sde_window 9 is longer than num_steps 10 less skip_last_steps 2"),
        (
            {"sde_window": 2, "timestep_fraction": 0.5},
            "sde_window is 2 and timestep_fraction 0.5: .* either from a window",
        ),
        ({"sde_window": 0}, "sampling.sde_window is 0"),
        (
            {"deterministic": True, "skip_last_steps": 2},
            "skip_last_steps is 2 and deterministic is true: no step of such a trajectory is trained on",
        ),
        (
            {"cache_interval": 2, "skip_first_steps": 1},
            "skip_first_steps is 1 and there is a cache or a solver and no sde_window",
        ),
    ],
)
def test_a_choice_of_steps_that_cannot_be_is_refused(keys: dict, text: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=text):
        windowed(tables, **keys)
