"""Training on a preference file: in one process, after a resume, with replay, and recipes that are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.diffusion.network_calls import calls_per_image
from ray_ddpo.common.preference_files import read_preferences, write_preferences
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.schedule import sde_window_of_round
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.train import run_training
from tests.preference_pairs import offline_tables, write_pairs
from tests.tiny_families import MAKERS, policy_table


@pytest.fixture
def offline(tables: dict, tmp_path: Path) -> dict:
    return offline_tables(tables, write_pairs(tmp_path / "pairs.parquet"))


def trained(tables: dict, **how: Any) -> tuple[dict[str, float], str]:
    """Run a recipe; return its last metrics and the fingerprint of its last weights."""
    recipe = Recipe.parse(tables)
    metrics = run_training(recipe, serial=True, **how)
    newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
    assert newest is not None
    return metrics, load_checkpoint(newest).learner.trained.fingerprint


@pytest.mark.rotated(every=3, group="resumed")
@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_a_run_trains_and_resumes_with_the_same_bits(family: str, offline: dict, tmp_path: Path) -> None:
    if family == "sd3":
        offline["policy"] = policy_table("sd3", MAKERS["sd3"](tmp_path / "sd3"))
    offline |= {"rounds": 3, "checkpoint": {"every": 1}}
    metrics, whole = trained(offline)
    assert metrics["reward/mean"] == 0 and metrics["reward/std"] == 1
    trained({**offline, "name": "parted", "rounds": 2})
    _, parted = trained({**offline, "name": "parted"}, resume=True)
    assert parted == whole
    assert trained({**offline, "name": "other", "seed": 1})[1] != whole


def test_the_ledger_names_rows_and_sides_and_replay_agrees(
    offline: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trained(offline | {"checkpoint": {"every": 1}})
    folder = RunFolder(Recipe.parse(offline).run_path())
    rows = Ledger(folder.storage, folder.load_recipe([]).rollouts).read(1).to_pylist()
    about = [json.loads(row["metadata"]) for row in rows]
    assert [each["side"] for each in about] == ["chosen", "rejected"] * 4
    assert [row["reward/preference"] for row in rows] == [1, -1] * 4
    assert [about[at]["row"] for at in (0, 2, 4, 6)] == [about[at]["row"] for at in (1, 3, 5, 7)]
    assert cli.main(["replay", folder.location, "--round", "1"]) == 0, capsys.readouterr()
    capsys.readouterr()


def test_pairs_that_were_trained_on_without_their_prompt_are_not_written(
    offline: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    offline["prompts"]["empty_prompts"] = 0.5
    trained(offline | {"rollouts": {"images_every": 1}})
    recipe = Recipe.parse(offline)
    ledger = Ledger(RunFolder(recipe.run_path()).storage, recipe.rollouts)
    prompts = [prompt for number in range(2) for prompt in ledger.read(number)["prompt"].to_pylist()]
    assert 0 < prompts.count("") < len(prompts)
    written = str(tmp_path / "again.parquet")
    assert cli.main(["preferences", recipe.run_path(), "--output", written]) == 0
    assert cli.main(["preferences", written]) == 0, capsys.readouterr().err
    assert len(list(read_preferences(Path(written)))) == (len(prompts) - prompts.count("")) / 2


def test_sft_trains_on_the_chosen_images_only(offline: dict) -> None:
    offline["algorithm"] = {"name": "sft"}
    metrics, fingerprint = trained(offline)
    rows = Ledger(RunFolder(Recipe.parse(offline).run_path()).storage, Recipe.parse(offline).rollouts).read(1)
    assert rows["advantage"].to_pylist() == [1, 0] * 4
    assert metrics["optimizer_steps"] == 1  # of four images; dpo makes two of eight
    assert fingerprint != trained({**offline, "name": "dpo", "algorithm": {"name": "dpo", "beta": 10.0}})[1]


def test_swapped_sides_turn_the_first_step_around(offline: dict, tmp_path: Path) -> None:
    """At the reference the gradient of DPO is the difference of the two images' gradients, up to a factor.

    Adapters' second matrices begin at 0, so after one step they are the step. The tiny model's encoder has no posterior.
    """
    pairs, steps = list(read_preferences(Path(offline["prompts"]["path"]))), []
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    write_preferences(tmp_path / "swapped.parquet", swapped)
    offline |= {"rounds": 1, "learner": {**offline["learner"], "batch_size": 8}}
    for path in (Path(offline["prompts"]["path"]), tmp_path / "swapped.parquet"):
        recipe = Recipe.parse({**offline, "name": path.stem, "prompts": {**offline["prompts"], "path": str(path)}})
        run_training(recipe, serial=True)
        newest = newest_checkpoint(RunFolder(recipe.run_path()).checkpoints)
        assert newest is not None
        arrays = load_checkpoint(newest).learner.trained.arrays()
        steps.append(np.concatenate([array.ravel() for name, array in arrays.items() if "lora_B" in name]))
    lengths = [np.linalg.norm(step) for step in steps]
    assert steps[0] @ steps[1] / (lengths[0] * lengths[1]) < -0.99


def test_evaluation_samples_held_out_prompts_and_scores_them(offline: dict) -> None:
    offline["prompts"]["held_out_prompts"] = ["bee"]
    offline["evaluation"] = {"every": 1, "images": 4, "batch_size": 2, "scorers": [{"name": "brightness"}]}
    offline["guard"] = {"best_by": "brightness"}
    metrics, _ = trained(offline)
    assert metrics["evaluation/preference/mean"] == 0 and np.isfinite(metrics["evaluation/brightness/mean"])
    folder = Recipe.parse(offline).run_path()
    assert cli.main(["report", folder]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts__images_per_prompt": 4}, "a group is a pair, so give 2"),
        ({"sampling__deterministic": False}, "give sampling.deterministic = true"),
        ({"algorithm": {"name": "ddpo_is"}}, "learns from the log-probs of all steps"),
        ({"prompts": {"name": "animals", "images_per_prompt": 2}}, "give prompts.name"),
        ({"evaluation": {"every": 1}}, "is 0 for every sampled image"),
        (
            {
                "reward": None,
                "rewards": [{"name": "preference"}, {"name": "brightness"}],
                "evaluation": {"every": 1},
                "guard": {"best_by": "preference"},
            },
            "guard.best_by is 'preference', and",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(offline: dict, changes: dict, said: str) -> None:
    for key, value in changes.items():
        table, _, name = key.partition("__")
        offline[table] = {**offline[table], name: value} if name else value
    with pytest.raises(ValueError, match=re.escape(said)):
        components_of(Recipe.parse(offline))


def test_a_family_without_an_encoder_is_refused(offline: dict, tmp_path: Path) -> None:
    components = components_of(Recipe.parse(offline))
    without = type("WithoutEncoder", (type(components.policy),), {"takes_images": False})
    from ray_ddpo.deploy.driver.given_image_checks import check_given_images

    given = replace(components, policy=without(**components.policy.model_dump()))
    with pytest.raises(ValueError, match="WithoutEncoder has no encoder"):
        check_given_images(given.recipe, given.policy, given.prompts, given.algorithm, given.rewards)


def test_a_damaged_image_ends_a_run_before_its_first_round(
    offline: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_pairs(tmp_path / "damaged.jsonl")
    image = tmp_path / "damaged" / "000003_chosen.png"
    image.write_bytes(image.read_bytes()[:200])
    offline["prompts"]["path"] = str(path)
    with pytest.raises(ValueError, match="row 4, chosen: it is no image"):
        run_training(Recipe.parse(offline), serial=True)


def test_another_file_in_its_place_is_refused_at_resume(offline: dict, tmp_path: Path) -> None:
    trained(offline | {"checkpoint": {"every": 1}})
    write_again = tmp_path / "pairs.parquet"
    write_again.unlink()
    write_pairs(write_again, ("cat", "dog", "horse", "ant", "owl"))
    with pytest.raises(ValueError, match=r"prompts\.path"):
        run_training(Recipe.parse(offline | {"rounds": 4}), serial=True, resume=True)


def test_the_reward_of_a_side_is_fixed() -> None:
    from ray_ddpo.actors.rewards.preference import Preference

    images = np.zeros((3, 4, 4, 3), np.uint8)
    prompts = [Prompt("a cat", {"side": "chosen"}), Prompt("a cat", {"side": "rejected"}), Prompt("a cat")]
    scored = Preference().load("cpu")(images, [each.text for each in prompts], [each.metadata for each in prompts])
    assert scored.tolist() == [1, -1, 0]


def test_plan_counts_one_call_of_the_network_per_image_and_needs_no_file(
    offline: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = Recipe.parse(offline)
    assert calls_per_image(recipe, sde_window_of_round(recipe, 0)) == 1
    offline["prompts"]["path"] = str(tmp_path / "not_there.parquet")
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(offline))
    assert cli.main(["plan", str(tmp_path / "recipe.toml")]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--serial"]) == 2
    assert "there is no preference file" in capsys.readouterr().err
