"""Selection of a group's best and worst images: the mask by hand, and what the learner then trains on."""

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.plan.numbers import plan_of_components
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.reward_aggregation import RewardAggregation
from ray_ddpo.learner.algorithms.selection import SelectionSettings, extremes
from ray_ddpo.train import run_training
from tests.rounds import SampledRound, components_with, learner_of, sample_round


def test_the_largest_and_the_smallest_of_each_group_are_left() -> None:
    groups = np.array([[0.3, -2.0, 1.0, 0.1, -0.2, 0.8], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert extremes(groups, 4).tolist() == [
        [False, True, True, False, True, True],
        [True, True, False, False, True, True],
    ]


def test_the_odd_image_is_one_of_the_best() -> None:
    assert extremes(np.array([[1.0, 2.0, 3.0, 4.0]]), 3).tolist() == [[True, False, True, True]]


def test_of_equal_advantages_the_first_counts_as_the_smaller() -> None:
    assert extremes(np.zeros((1, 5)), 2).tolist() == [[True, False, False, False, True]]


def test_the_subset_has_the_largest_variance_of_all_subsets_of_its_size() -> None:
    """Compare with an exhaustive search over symmetric groups, where PODS's best subset is half from each end."""
    half = np.random.default_rng(0).uniform(0.1, 1, (5, 4))
    groups = np.concatenate([half, -half], axis=1)
    for group, mask in zip(groups, extremes(groups, 4), strict=True):
        best = max(np.var(each) for each in combinations(group, 4))
        assert np.var(group[mask]) == pytest.approx(best)


def test_advantages_of_selected_images_stay_as_they_are() -> None:
    advantages = np.array([0.5, -1.0, 2.0, -1.5, 0.1, 0.2, 0.3, 0.4])
    found = SelectionSettings(fraction=0.5).select(advantages, 4)
    assert found.tolist() == [0.0, 0.0, 2.0, -1.5, 0.1, 0.0, 0.0, 0.4]
    assert SelectionSettings().select(advantages, 4) is advantages


def test_the_best_of_a_group_are_those_with_the_largest_advantages() -> None:
    advantages = np.array([0.5, -1.0, 2.0, -1.5, 0.1, 0.4, 0.3, 0.4])
    kept = SelectionSettings(fraction=0.5, keep="best").select(advantages, 4)
    assert kept.tolist() == [0.5, 0.0, 2.0, 0.0, 0.0, 0.4, 0.0, 0.4]
    one = SelectionSettings(fraction=0.25, keep="best").select(advantages, 4)
    assert one.tolist() == [0.0, 0.0, 2.0, 0.0, 0.0, 0.4, 0.0, 0.0]
    assert SelectionSettings(fraction=0.25, keep="best").select(advantages, 1).nonzero()[0].tolist() == [0, 2]


def test_without_groups_the_round_is_one() -> None:
    found = SelectionSettings(fraction=0.5).select(np.array([4.0, 1.0, 3.0, 2.0]), 1)
    assert found.tolist() == [4.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["sum", "advantages"])
def test_aggregated_rewards_are_selected_by_their_joint_advantage(kind: str, tables: dict) -> None:
    algorithm = grpo(tables, fraction=0.5).algorithm
    aggregation = RewardAggregation({"a": 1.0, "b": 1.0}, kind)
    rewards = {"a": np.array([1.0, 2.0, 3.0, 4.0]), "b": np.array([0.0, 0.0, 0.0, 9.0])}
    _, found = aggregation.compute_advantages(algorithm, {}, ["cat"] * 4, rewards, 4)
    assert np.flatnonzero(found.advantages).tolist() == [0, 3]


def grpo(tables: dict, batch_size: int = 8, **selection: object) -> Components:
    """Return the small recipe with groups of four."""
    algorithm = {"name": "grpo", "clip_range": 1e-3, "selection": selection}
    keys = {"prompts__images_per_prompt": 4, "learner__batch_size": batch_size, "learner__micro_batch_size": 4}
    return components_with({**tables, "algorithm": algorithm}, **keys)


def update(components: Components, advantages: np.ndarray, dropped: tuple[int, ...] = ()) -> tuple[dict, str, bool]:
    """Train on a round. Return metrics, the new weights' fingerprint, and whether weights changed."""
    learner = learner_of(components)
    before = learner.weights()[-1]
    sampled = sample_round(components, before)
    batch = dataclasses.replace(sampled.batch, advantages=advantages, dropped=dropped)
    metrics, state = learner.update(batch, *SampledRound(batch, sampled.trajectories).trajectories)
    return metrics, state.trained.fingerprint, state.trained.fingerprint != before.fingerprint


ADVANTAGES = np.array([1.2, -0.1, 0.2, -1.3, 0.4, 1.0, -1.5, 0.1])


def test_unselected_images_do_not_influence_the_weights(tables: dict) -> None:
    """The bits are those of an update from which the same images are dropped."""
    selecting = grpo(tables, fraction=0.5)
    selected = selecting.algorithm.select(ADVANTAGES, 4)
    assert np.flatnonzero(selected == 0).tolist() == [1, 2, 4, 7]
    metrics, found, changed = update(selecting, selected)
    assert changed and metrics["optimizer_steps"] == 1
    assert found == update(grpo(tables), ADVANTAGES, dropped=(1, 2, 4, 7))[1]
    assert found != update(grpo(tables), ADVANTAGES)[1]


def test_selected_images_fill_optimizer_steps_of_the_usual_size(tables: dict) -> None:
    components = grpo(tables, batch_size=2, fraction=0.5)
    metrics, _, _ = update(components, components.algorithm.select(ADVANTAGES, 4))
    assert metrics["optimizer_steps"] == 2  # of 2 of the 4 selected images
    plan = plan_of_components(components)
    assert (plan.images_learned_from, plan.optimizer_steps) == (4, 2)


def test_a_round_of_groups_with_equal_rewards_makes_no_step(tables: dict) -> None:
    metrics, _, changed = update(grpo(tables, skip_zero=True), np.zeros(8))
    assert not changed and metrics["optimizer_steps"] == 0 and np.isnan(metrics["loss"])


def test_a_group_with_equal_rewards_is_left_out(tables: dict) -> None:
    equal = np.concatenate([np.zeros(4), ADVANTAGES[4:]])
    _, skipped, _ = update(grpo(tables, skip_zero=True), equal)
    assert skipped == update(grpo(tables), equal, dropped=(0, 1, 2, 3))[1]
    assert skipped != update(grpo(tables), equal)[1]  # where zeros are part of the mean


@pytest.mark.parametrize("group", [1, 4])
def test_a_selection_of_fewer_than_two_images_is_refused(group: int, tables: dict) -> None:
    algorithm = {"name": "ddpo_is", "selection": {"fraction": 0.15}}
    size = 4 if group == 4 else 8
    with pytest.raises(ValueError, match=f"fraction is 0.15 and a group has {size} images"):
        components_with({**tables, "algorithm": algorithm}, prompts__images_per_prompt=group)


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ({"keep": "best"}, 'keep is "best" and fraction 1, which keeps all images'),
        (
            {"keep": "best", "fraction": 0.1},
            "has 4 images: at least the best of them must be left, so give at least 0.25",
        ),
    ],
)
def test_a_selection_of_the_best_that_selects_nothing_is_refused(selection: dict, text: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=text):
        components_with({**tables, "algorithm": {"name": "grpo", "selection": selection}}, prompts__images_per_prompt=4)


def test_an_update_on_the_best_is_one_without_the_others(tables: dict) -> None:
    """Only the best two of each group change the weights."""
    best = grpo(tables, fraction=0.5, keep="best")
    selected = best.algorithm.select(ADVANTAGES, 4)
    assert np.flatnonzero(selected).tolist() == [0, 2, 4, 5]
    found = update(best, selected)[1]
    assert found == update(grpo(tables), ADVANTAGES, dropped=(1, 3, 6, 7))[1] != update(grpo(tables), ADVANTAGES)[1]


def test_a_run_records_which_images_were_trained_on(tables: dict) -> None:
    components = grpo({**tables, "rounds": 1}, fraction=0.5)
    metrics = run_training(components.recipe, serial=True)
    assert metrics["optimizer_steps"] == 1
    advantages = np.array(
        Ledger(RunFolder(components.recipe.run_path()).storage, components.recipe.rollouts).read(0)["advantage"]
    )
    assert (advantages.reshape(2, 4) != 0).sum(axis=1).tolist() == [2, 2]


def test_planned_steps_are_those_of_groups_that_the_fraction_does_not_divide(tables: dict) -> None:
    """Half of a group of 3 is 2 images: 8 of 12, in 4 steps of 2. So a schedule counts no step twice."""
    tables = {**tables, "learner": {"batch_size": 2, "micro_batch_size": "auto", "warmup_steps": 20}}
    tables["sampling"] = {**tables["sampling"], "batch_size": 6}
    algorithm = {"name": "grpo", "clip_range": 1e-3, "selection": {"fraction": 0.5}}
    components = components_with({**tables, "algorithm": algorithm}, prompts__images_per_prompt=3)
    plan = plan_of_components(components)
    assert (plan.images_learned_from, plan.optimizer_steps) == (8, 4)
    run_training(components.recipe, serial=True)
    logged = (Path(components.recipe.run_path()) / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in logged]
    assert [each["optimizer_steps"] for each in rounds] == [4, 4]
    assert [each["learning_rate"] for each in rounds] == pytest.approx([3e-4 * 4 / 20, 3e-4 * 8 / 20])


def test_more_steps_than_planned_repeat_the_rounds_last_rate(tables: dict) -> None:
    """RWR-sparse trains on all images that are equally good, however many were expected."""
    algorithm = {"name": "rwr_sparse", "percentile": 50, "noised_samples": 4}
    keys = {"learner__batch_size": 2, "learner__micro_batch_size": 4, "learner__warmup_steps": 8}
    components = components_with({**tables, "algorithm": algorithm}, **keys)
    metrics, _, _ = update(components, np.ones(8))
    assert plan_of_components(components).optimizer_steps == 2 and metrics["optimizer_steps"] == 4
    assert metrics["learning_rate"] == pytest.approx(1e-3 * 2 / 8)
