"""`ddpo train RECIPE --from RUN[@ROUND]`: a new run starts from an earlier run's weights, and says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import StartFromTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.start_from import start_from_of
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, checkpoint_of, load_checkpoint
from ray_ddpo.train import run_training
from tests.altered_files import altered
from tests.conftest import small_tables
from tests.failure_page import assert_documented


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a model, a recipe, and a run of two rounds with a checkpoint after each and a best version."""
    home = tmp_path_factory.mktemp("home")
    tables = small_tables(Path(shutil.copytree(tiny_model, home / "model")), home)
    tables |= {"name": "first", "checkpoint": {"every": 1}, "evaluation": {"every": 1, "images": 2, "batch_size": 2}}
    (home / "recipe.toml").write_text(tomli_w.dumps(tables))
    run_training(Recipe.parse(tables), serial=True)
    return home


def started(home: Path, name: str, source: str, *words: str) -> int:
    """The exit code of a new run that starts from `source` with another learning rate."""
    other = ["--name", name, "--learner.learning_rate", "5e-4", "--evaluation.every", "0", *words]
    return cli.main(["train", str(home / "recipe.toml"), "--serial", "--from", source, *other])


def checkpoint(home: Path, name: str, rounds_done: int) -> Checkpoint:
    return load_checkpoint(checkpoint_of(RunFolder(home / "runs" / name).checkpoints, rounds_done))


@pytest.mark.rotated(every=2, group="longest")
def test_a_run_starts_from_a_rounds_weights_with_a_fresh_optimizer_and_says_so(
    home: Path, capsys: pytest.CaptureFixture
) -> None:
    first = home / "runs/first"
    before = checkpoint(home, "first", 1).learner.trained
    assert started(home, "second", f"{first}@1", "--rounds", "1") == 0
    told = f"starts from {first} after round 1, weights {before.fingerprint[:12]}; optimizer state and statistics"
    assert told in capsys.readouterr().out
    begun, done = checkpoint(home, "second", 0), checkpoint(home, "second", 1)
    assert begun.learner.trained.fingerprint == before.fingerprint and begun.learner.policy_version == 0
    assert begun.learner.optimizer == {} and begun.statistics == {}
    steps = [array for name, array in done.learner.optimizer.items() if name.endswith("/step")]
    assert {float(step) for step in steps} == {2.0}, "two optimizer steps of its own round, and none of the first run's"
    folder = RunFolder(home / "runs/second")
    source = {"run": str(first), "round": 1, "fingerprint": before.fingerprint}
    assert folder.recipe_tables()["start_from"] == source
    ledger = Ledger(folder.storage, Recipe.load(home / "recipe.toml").rollouts)
    assert ledger.about(0)["start_from"] == source
    assert set(ledger.read(0).to_pydict()["fingerprint"]) == {before.fingerprint}, (
        "its first images are of these weights"
    )
    assert cli.main(["report", folder.location]) == 0
    assert f"started from {first} after round 1" in capsys.readouterr().out
    assert json.loads(folder.report.read("summary.json"))["start_from"] == source
    assert f"started from the weights of {first}" in folder.report.read("report.html").decode()


@pytest.mark.rotated(every=2, group="longest")
def test_a_resume_needs_neither_the_earlier_run_nor_the_option(home: Path, capsys: pytest.CaptureFixture) -> None:
    whole, halves, first = str(home / "runs/first"), "halves", home / "runs/first"
    assert started(home, "whole", whole) == 0
    assert started(home, halves, whole, "--rounds", "1") == 0
    shutil.rmtree(home / "runs/halves/checkpoints/round-000001")  # as if it was killed in its first round
    first.rename(home / "runs/away")
    try:
        rest = ["--serial", "--name", halves, "--learner.learning_rate", "5e-4", "--evaluation.every", "0"]
        assert cli.main(["train", str(home / "recipe.toml"), "--resume", "auto", *rest]) == 0
        assert started(home, halves, whole, "--resume", "auto") == 0  # as a job that is submitted again says it
        assert started(home, halves, f"{whole}@1", "--resume", "auto") == 2
        assert f"started from {whole} after round 2, and --from now says {whole}@1" in capsys.readouterr().err
    finally:
        (home / "runs/away").rename(first)
    fingerprints = {checkpoint(home, name, 2).learner.trained.fingerprint for name in ("whole", halves)}
    assert len(fingerprints) == 1


def test_the_best_version_is_a_source_too(home: Path) -> None:
    best = RunFolder(home / "runs/first").best_version()
    assert best and started(home, "of_best", f"{home}/runs/first@best", "--rounds", "1") == 0
    tables = RunFolder(home / "runs/of_best").recipe_tables()["start_from"]
    assert (tables["round"], tables["fingerprint"]) == (best["policy_version"], best["fingerprint"])


def test_another_recipe_is_refused_with_the_way_forward(home: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = str(home / "recipe.toml")
    for key, value in (("learner.learning_rate", "0.01"), ("reward.name", "jpeg_incompressibility")):
        code = cli.main(["train", recipe, "--serial", "--resume", "auto", f"--{key}", value])
        situation = "a run is resumed with another learning rate, reward or prompts"
        assert_documented(situation, code, capsys.readouterr().err)
    assert cli.main(["train", recipe, "--serial"]) == 2
    assert f"--from {home}/runs/first starts the other run from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words", "situation", "says"),
    [
        ("{home}/nowhere", (), "--from names no run", "nowhere"),
        ("{home}/runs/first@7", (), "--from names a round that was not kept", "after round 7, but after: 1, 2"),
        (
            "{run}",
            ("--policy.lora.rank", "8"),
            "--from names weights that do not fit the recipe",
            "policy.lora.rank was 4",
        ),
        ("{run}", ("--policy.lora.alpha", "8"), "--from names weights that do not fit the recipe", "policy.lora.alpha"),
        (
            "{run}",
            ("--policy.lora.target_modules", '["to_q"]'),
            "--from names weights that do not fit the recipe",
            "policy.lora.target_modules was ['to_k',",
        ),
        (
            "{run}",
            ("--policy.train", "full"),
            "--from names weights that do not fit the recipe",
            "policy.train was 'lora'",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_its_key(
    home: Path, source: str, words: tuple[str, ...], situation: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    code = started(home, "refused", source.format(home=home, run=home / "runs/first"), *words)
    printed = capsys.readouterr().err
    assert_documented(situation, code, printed)
    assert says in printed and not (home / "runs/refused/recipe.toml").exists()


def test_another_model_is_refused_and_an_edited_reward_is_not(home: Path, capsys: pytest.CaptureFixture) -> None:
    with altered(next((home / "model/unet").glob("*.safetensors"))):
        code = started(home, "refused", str(home / "runs/first"))
    printed = capsys.readouterr().err
    assert_documented("--from names weights of another model", code, printed)
    assert f"{home}/model/unet" in printed and not (home / "runs/refused/recipe.toml").exists()


def test_what_the_option_takes() -> None:
    assert start_from_of("runs/a").round is None and start_from_of("runs/a@12").round == 12
    assert start_from_of("s3://bucket/runs@home/a").run == "s3://bucket/runs@home/a"
    assert start_from_of("runs/a@best") == start_from_of("runs/a/best/") == StartFromTable(run="runs/a", round="best")
    for wrong in ("runs/a@0", "runs/a@-1", "runs/a@last", "@3", "runs/a@"):
        with pytest.raises(ValueError, match="--from is .* it must be a run's folder, or folder@ROUND"):
            start_from_of(wrong)


@pytest.mark.thorough
def test_a_run_starts_from_a_full_network_too(tables: dict) -> None:
    tables["policy"] |= {"train": "full"}
    tables |= {"rounds": 1, "checkpoint": {"every": 1}}
    run_training(Recipe.parse({**tables, "name": "first"}), serial=True)
    home = Path(tables["output_dir"]).parent
    source = {"run": str(home / "runs/first")}
    run_training(Recipe.parse({**tables, "name": "second", "start_from": source}), serial=True)
    before, begun = checkpoint(home, "first", 1), checkpoint(home, "second", 0)
    assert np.array_equal(before.learner.trained.buffer, begun.learner.trained.buffer)
