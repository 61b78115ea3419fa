"""Rounds that are refilled with further groups: what is trained on, the ledger, metrics, replay and resume."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.deploy.driver.round_work import counted_work
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training


@pytest.fixture
def refilled(tables: dict) -> dict:
    tables["prompts"] |= {"images_per_prompt": 2}
    tables["reward"] = {"name": "function", "path": "tests.user_functions:seldom"}
    tables["algorithm"] = {"name": "grpo", "clip_range": 1e-3, "selection": {"refill": 20}}
    return tables


def trained(tables: dict, resume: bool = False) -> tuple[dict[str, float], str]:
    recipe = Recipe.parse(tables)
    metrics = run_training(recipe, serial=True, resume=resume)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    return metrics, load_checkpoint(newest).learner.trained.fingerprint


def ledger_of(tables: dict) -> Ledger:
    recipe = Recipe.parse(tables)
    return Ledger(RunFolder(recipe.run_path()).storage, recipe.rollouts)


def test_a_round_trains_on_its_number_of_groups_with_spread(refilled: dict) -> None:
    metrics, _ = trained(refilled)
    for round_index in range(2):
        table = ledger_of(refilled).read(round_index)
        rewards = table["reward"].to_numpy().reshape(-1, 2)
        differ = np.flatnonzero(rewards[:, 0] != rewards[:, 1])
        assert len(differ) >= 4 and len(rewards) > 4, "the test needs a round that has to be refilled"
        advantages = table["advantage"].to_numpy().reshape(-1, 2)
        assert np.flatnonzero(advantages.any(axis=1)).tolist() == differ[:4].tolist()
        assert table["dropped"].null_count == len(table)
    assert metrics["images"] == len(table) and metrics["optimizer_steps"] == 2
    assert metrics["refill/groups"] == len(rewards) - 4 and metrics["refill/lacking"] == 0


def test_the_learners_mfu_counts_no_groups_that_were_left_out(refilled: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_ddpo.common.machine.matrix_rate", lambda device, dtype: 1e9)
    metrics, _ = trained(refilled)
    work = counted_work(components_of(Recipe.parse(refilled)))
    assert work is not None and metrics["images"] > 8
    assert metrics["mfu/learner"] == pytest.approx(8 * work.learning / (metrics["seconds/learn"] * 1e9))


def test_attempts_end_with_the_groups_that_there_are(refilled: dict) -> None:
    refilled["reward"]["path"] = "tests.user_functions:never"
    refilled["algorithm"]["selection"]["refill"] = 3
    metrics, fingerprint = trained(refilled)
    assert metrics["images"] == 4 * 8 and metrics["refill/groups"] == 3 * 4 and metrics["refill/lacking"] == 4
    assert metrics["optimizer_steps"] == 0


@pytest.mark.rotated(every=3, group="resumed")
def test_a_resumed_run_has_the_same_bits(refilled: dict) -> None:
    refilled |= {"rounds": 3, "checkpoint": {"every": 1}, "max_policy_lag": 1}
    _, whole = trained(refilled)
    trained({**refilled, "name": "parted", "rounds": 2})
    assert trained({**refilled, "name": "parted"}, resume=True)[1] == whole


def test_a_round_that_needs_no_further_groups_has_the_bits_of_a_run_without(refilled: dict) -> None:
    refilled["reward"] = {"name": "brightness"}
    _, fingerprint = trained(refilled)
    assert [len(ledger_of(refilled).read(round_index)) for round_index in range(2)] == [8, 8]
    refilled["algorithm"]["selection"] = {"skip_zero": True}
    assert trained({**refilled, "name": "without"})[1] == fingerprint


def test_replay_and_preferences_know_the_further_groups(
    refilled: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trained(refilled | {"checkpoint": {"every": 1}, "rollouts": {"images_every": 1}})
    folder = Recipe.parse(refilled).run_path()
    assert cli.main(["replay", folder, "--round", "1"]) == 0, capsys.readouterr()
    assert cli.main(["preferences", folder, "--output", str(tmp_path / "pairs.parquet")]) == 0
    assert f"{tmp_path / 'pairs.parquet'}: 8 pairs of" in capsys.readouterr().out  # four of each round


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("algorithm", [{"name": "dpo", "beta": 10.0, "refill": 20}, {"name": "sft", "refill": 20}])
def test_losses_on_noised_samples_refill_too(refilled: dict, algorithm: dict) -> None:
    refilled["algorithm"] = algorithm
    refilled["learner"]["micro_batch_size"] = 4
    metrics, _ = trained(refilled)
    assert metrics["refill/lacking"] == 0 and metrics["refill/groups"] > 0
    advantages = ledger_of(refilled).read(1)["advantage"].to_numpy()
    assert np.count_nonzero(advantages) == (8 if algorithm["name"] == "dpo" else 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts__images_per_prompt": 1}, "a group needs at least 2 images"),
        ({"learner__parts_per_round": 2}, "when all of its images are scored"),
        ({"algorithm__advantages": {"kind": "round"}}, "give 'group'"),
        ({"sampling__kl_reward": 0.1}, "differs within every group"),
    ],
)
def test_a_recipe_that_cannot_be_refilled_is_refused(refilled: dict, changes: dict, said: str) -> None:
    for key, value in changes.items():
        table, _, name = key.partition("__")
        refilled[table] = {**refilled[table], name: value}
    if "prompts__images_per_prompt" in changes:
        refilled["algorithm"] = {"name": "sft", "refill": 1}
    with pytest.raises(ValueError, match=re.escape(said)):
        components_of(Recipe.parse(refilled))


def test_plan_says_how_many_images_a_round_may_have(refilled: dict, capsys: pytest.CaptureFixture) -> None:
    import tomli_w

    file = Path(refilled["output_dir"]).parent / "recipe.toml"
    file.write_text(tomli_w.dumps(refilled))
    assert cli.main(["plan", str(file)]) == 0
    said = capsys.readouterr().out
    assert "up to 168 images" in said and math.prod((21, 8)) == 168
