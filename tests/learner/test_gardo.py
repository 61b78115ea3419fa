"""GARDO: gate, fraction, distances and advantages by hand, and a reference that moves and survives a resume."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.trajectory import thumbnails
from ray_ddpo.learner.algorithms.advantages import group_advantages
from ray_ddpo.learner.algorithms.gardo import (
    GARDO,
    gated,
    next_fraction,
    relative_distances,
    round_win_rates,
    uncertainty,
)
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.rounds import components_with, learner_of, sample_round


def gardo_tables(tables: dict, **keys: object) -> dict:
    """Return the small recipe with GARDO, an auxiliary reward and groups of two."""
    return {
        **tables,
        "algorithm": {"name": "gardo", **keys},
        "rewards": [{"name": "brightness"}, {"name": "jpeg_compressibility", "weight": 0}],
        "prompts": {**tables["prompts"], "images_per_prompt": 4},
        "sampling": {**tables["sampling"], "thumbnails": True},
    }


@pytest.fixture
def gardo(tables: dict) -> dict:
    tables.pop("reward")
    return gardo_tables(tables)


def test_the_gate_has_the_images_that_the_trained_reward_rates_too_well() -> None:
    """Win rates of others beaten: the trained reward's 0, ½, 1; one auxiliary reward agrees, one ranks the reverse."""
    trained, same = np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0])
    assert round_win_rates(trained).tolist() == [0, 0.5, 1]
    assert round_win_rates(np.array([5.0, 5.0, 1.0, 7.0])).tolist() == pytest.approx([0.5, 0.5, 0, 1])
    found = uncertainty(trained, {"same": same, "reverse": -same})
    assert found.tolist() == [-0.5, 0, 0.5]  # 0 − (0 + 1) / 2, …
    # Of the uncertainties that are not negative, 0 and ½, the most uncertain half is above their 50th percentile, ¼.
    assert gated(found, 0.5).tolist() == [False, False, True]


def test_win_rates_are_those_of_all_pairs() -> None:
    rewards = np.random.default_rng(0).integers(0, 5, 40).astype(float)
    wins = np.sign(rewards[:, None] - rewards[None]).sum(1)
    np.testing.assert_allclose(round_win_rates(rewards), 0.5 + 0.5 * wins / 39)


def test_the_fraction_follows_records_of_the_risk() -> None:
    """The authors' RiskCompensator: × 1.1 above the largest risk so far, × 0.9 below the smallest, within 0.02 … 0.2."""
    assert next_fraction(0.1, 0.3, ()) == 0.1
    assert next_fraction(0.1, 0.31, (0.2, 0.3)) == pytest.approx(0.11)
    assert next_fraction(0.1, 0.25, (0.2, 0.3)) == 0.1
    assert next_fraction(0.1, 0.19, (0.2, 0.3)) == pytest.approx(0.09)
    assert next_fraction(0.2, 0.9, (0.2,)) == 0.2 and next_fraction(0.02, 0.1, (0.2,)) == 0.02


def test_the_gate_remembers_risks_and_fraction() -> None:
    trained, auxiliary = np.array([1.0, 2.0, 3.0]), {"other": np.array([3.0, 2.0, 1.0])}
    history, factors = GARDO(gate_fraction=0.1).gate_kl({}, trained, auxiliary)
    assert factors is not None and factors.tolist() == [0, 0, 1]  # uncertainties -1, 0, 1
    assert history == {"risk": (0.5,), "fraction": (0.1,)}
    calm, _ = GARDO().gate_kl(history, trained, {"other": trained})
    assert calm == {"risk": (0.5, 0.0), "fraction": (pytest.approx(0.09),)}
    assert GARDO(gate=False).gate_kl({}, trained, auxiliary) == ({}, None)


def test_a_round_without_images_to_compare_leaves_the_gates_history(gardo: dict) -> None:
    """No group has different rewards, so that a refilled round trains on none."""
    history, factors = GARDO().gate_kl({"risk": (0.5,), "fraction": (0.1,)}, np.zeros(0), {"other": np.zeros(0)})
    assert history == {"risk": (0.5,), "fraction": (0.1,)} and factors is not None and not len(factors)
    tables = gardo_tables(gardo, selection={"refill": 1}) | {"rounds": 1}
    tables["rewards"][0] = {"name": "function", "path": "tests.user_functions:never"}
    assert run_training(Recipe.parse(tables), serial=True)["optimizer_steps"] == 0


def test_positive_advantages_are_multiplied_by_the_relative_distance_to_the_nearest_image() -> None:
    """Features 0, 3 and 9 of a group: nearest at 3, 3 and 6, whose mean is 4; a group of like images stays."""
    features = np.array([[0, 0], [3, 3], [9, 9], [7, 7], [7, 7], [7, 7]], np.uint8)
    assert relative_distances(features, 3).tolist() == [0.75, 0.75, 1.5, 1, 1, 1]
    advantages = np.array([-2.0, 1.0, 4.0, 1.0, -1.0, 0.0])
    assert GARDO().shape_advantages(advantages, features, 3).tolist() == [-2, 0.75, 6, 1, -1, 0]
    assert GARDO(diversity=False).shape_advantages(advantages, features, 3) is advantages


def test_advantages_are_not_divided_by_a_deviation() -> None:
    assert group_advantages(np.array([1.0, 3.0, 10.0, 10.0]), 2, "none").tolist() == [-1, 1, 0, 0]


def test_thumbnails_are_means_of_areas() -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:2, :4] = 200
    small = thumbnails(image[None])
    assert small.shape == (1, 16, 16, 3) and small[0, 0, 0].tolist() == [200] * 3 and small.sum() == 600


def test_only_gated_images_have_a_kl_and_it_is_to_the_moving_reference(gardo: dict) -> None:
    """The gradient is that of the policy's part alone without gated images, and changes with them."""
    components = components_with(gardo_tables(gardo, kl_coef=5.0, clip_range=1.0))
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    found = {}
    for name, factors in {"none": np.zeros(8), "all": np.ones(8), "one": np.eye(8)[3]}.items():
        learner = learner_of(components)
        batch = dataclasses.replace(sampled.batch, kl_weights=factors)
        metrics, state = learner.update(batch, *sampled.trajectories)
        found[name] = state.trained.fingerprint
        assert metrics["kl_moving_reference_nats"] > 0 and "kl_reference_nats" not in metrics
        assert metrics["reference_version"] == 0
    unregularized = learner_of(components_with(gardo_tables(gardo, kl_coef=0.0, clip_range=1.0, gate=False)))
    found["without"] = unregularized.update(sampled.batch, *sampled.trajectories)[1].trained.fingerprint
    assert found["none"] == found["without"] and len({found["none"], found["all"], found["one"]}) == 3


@pytest.mark.rotated(every=3, group="resumed")
@pytest.mark.parametrize(
    ("keys", "versions"), [({"reset_rounds": 2, "reset_kl": 0}, [0, 0, 2, 2]), ({"reset_kl": 1e-12}, [0, 1, 2, 3])]
)
def test_the_reference_moves_and_a_resumed_run_has_its_bits(
    keys: dict, versions: list[int], gardo: dict, tmp_path: Path
) -> None:
    tables = gardo_tables(gardo, **keys) | {"rounds": 4, "checkpoint": {"every": 1}}
    whole = Recipe.parse({**tables, "name": "whole"})
    run_training(whole, serial=True)
    rows = [json.loads(line) for line in (Path(whole.run_path()) / "metrics.jsonl").read_text().splitlines()]
    assert [row["reference_version"] for row in rows] == versions
    run_training(Recipe.parse({**tables, "name": "parted", "rounds": 3}), serial=True)
    parted = Recipe.parse({**tables, "name": "parted"})
    run_training(parted, serial=True, resume=True)
    ends = [load_checkpoint(newest_checkpoint(RunFolder(each.run_path()).checkpoints)) for each in (whole, parted)]
    assert ends[0].learner.reference is not None and ends[0].statistics["gate"]["risk"]
    assert ends[0].learner.reference.fingerprint == ends[1].learner.reference.fingerprint
    assert ends[0].learner.trained.fingerprint == ends[1].learner.trained.fingerprint
    assert ends[0].statistics == ends[1].statistics


@pytest.mark.parametrize(
    ("table", "value", "words"),
    [
        ("rewards", [{"name": "brightness"}], "no reward has weight 0"),
        ("learner", {"batch_size": 4, "replay_rounds": 1}, "algorithm.gate is true and learner.replay_rounds 1"),
        ("algorithm", {"name": "gardo", "kl_coef": 0}, "algorithm.gate is true and there is no KL"),
        ("aggregation", {"kind": "z_score"}, "give aggregation.kind = 'sum' and no floor"),
        ("sampling", {"num_steps": 4}, "algorithm.diversity is true and sampling.thumbnails false"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(table: str, value: object, words: str, gardo: dict) -> None:
    with pytest.raises(ValueError, match=words):
        components_with({**gardo, table: value})
