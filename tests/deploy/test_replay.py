"""ddpo replay: a round sampled again equals the trained round, and differences are reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.train import run_training
from tests.conftest import small_tables


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Train three rounds at lag 1: the last checkpoint holds versions 2 and 3, the one before versions 1 and 2."""
    home = tmp_path_factory.mktemp("replay")
    tables = small_tables(tiny_model, home) | {"rounds": 3, "max_policy_lag": 1, "checkpoint": {"every": 1, "keep": 2}}
    lines = [json.dumps({"prompt": f"cat {at}", "bonus": at, "about": {"boxes": [[at, 0.1]]}}) for at in range(5)]
    (home / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tables["prompts"] = {"name": "file", "path": str(home / "prompts.jsonl")}
    tables["reward"] = {"name": "function", "path": "tests.user_functions:prompts_and_metadata"}
    recipe = Recipe.parse({**tables, "rollouts": {"images_every": 2}})
    run_training(recipe, serial=True)
    return recipe


@pytest.fixture
def run(trained: Recipe, tmp_path: Path) -> RunFolder:
    """Return a copy of the run, to be altered."""
    return RunFolder(str(shutil.copytree(trained.run_path(), tmp_path / "run")))


def replayed(folder: RunFolder, round_index: int, capsys: pytest.CaptureFixture, *overrides: str) -> tuple[int, str]:
    """The exit code, and what was printed."""
    code = cli.main(["replay", folder.location, "--round", str(round_index), *overrides])
    return code, "".join(capsys.readouterr())


def alter(folder: RunFolder, round_index: int, change: Callable[[list[dict]], None]) -> None:
    """Change a round's rows in the ledger."""
    path = Path(folder.location) / f"rollouts/round={round_index:06d}/images.parquet"
    table = parquet.ParquetFile(path).read()
    rows = table.to_pylist()
    change(rows)
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_run_writes_every_round_into_its_ledger(run: RunFolder, trained: Recipe) -> None:
    ledger = Ledger(run.storage, trained.rollouts)
    assert ledger.rounds() == [0, 1, 2]
    versions = [ledger.read(round_index).to_pydict()["policy_version"][0] for round_index in range(3)]
    assert versions == [0, 0, 1] and ledger.read(1).num_rows == trained.images_per_round
    assert ["pixels" in ledger.read(round_index).column_names for round_index in range(3)] == [True, False, True]
    for row in ledger.read(2).to_pylist():
        at = int(row["prompt"].removeprefix("cat "))
        assert json.loads(row["metadata"]) == {"bonus": at, "about": {"boxes": [[at, 0.1]]}}
        assert row["reward"] == len(row["prompt"]) + at, "the reward function had the metadata"


def test_metadata_that_is_another_is_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    def change(rows: list[dict]) -> None:
        rows[1]["metadata"] = "{}"

    alter(run, 2, change)
    code, text = replayed(run, 2, capsys)
    assert code == 1 and text.startswith("image 1: metadata is '{}' in the ledger, and ")


def test_a_round_sampled_again_is_equal_image_by_image(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    code, text = replayed(run, 2, capsys)
    assert code == 0 and text == "round 2, re-sampled with policy version 1: all 8 images are equal\n"


def test_an_image_that_is_another_is_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    def change(rows: list[dict]) -> None:
        rows[5]["image_fingerprint"] = "f" * 64

    alter(run, 2, change)
    code, text = replayed(run, 2, capsys)
    lines = text.splitlines()
    assert code == 1 and len(lines) == 2 and lines[1].endswith(": 1 of 8 images differ")
    assert lines[0].startswith("image 5: the ledger has ffffffffffff, and re-sampled it is ")


@pytest.mark.thorough
def test_a_seed_that_is_not_the_schedules_is_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    def change(rows: list[dict]) -> None:
        rows[3]["seed"] += 4

    alter(run, 2, change)
    code, text = replayed(run, 2, capsys)
    assert code == 1 and "image 3: seed is" in text and "by the recipe; the ledger has" in text


@pytest.mark.thorough
def test_weights_that_are_not_the_checkpoints_are_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    def change(rows: list[dict]) -> None:
        for row in rows:
            row["fingerprint"] = "e" * 64

    alter(run, 2, change)
    code, text = replayed(run, 2, capsys)
    assert code == 1 and "image 0: sampled with weights eeeeeeeeeeee, the checkpoint's are " in text
    assert "8 of 8 images differ" in text


@pytest.mark.thorough
def test_a_recipe_that_samples_otherwise_is_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    code, text = replayed(run, 2, capsys, "--sampling.guidance_scale", "2.5")
    assert code == 1 and "8 of 8 images differ" in text


@pytest.mark.thorough
def test_weights_that_were_not_kept_are_reported_with_those_that_are(
    run: RunFolder, capsys: pytest.CaptureFixture
) -> None:
    code, text = replayed(run, 0, capsys)
    assert code == 2 and "round 0 was sampled with policy version 0, which no checkpoint in" in text
    assert "(round-000003 has [2, 3]; round-000002 has [1, 2])" in text and "larger checkpoint.keep" in text


@pytest.mark.thorough
def test_a_round_that_the_ledger_does_not_have_is_reported(run: RunFolder, capsys: pytest.CaptureFixture) -> None:
    code, text = replayed(run, 7, capsys)
    assert code == 2 and "has no round 7: it has 3 rounds, 0 to 2" in text
    code, text = replayed(RunFolder(f"{run.location}/lora"), 7, capsys)
    assert code == 2 and "is no run's folder" in text
