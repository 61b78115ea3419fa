"""A run in an object store: saved, found, resumed to the same bits, reported and sampled from."""

import json
import re
from pathlib import Path

import pytest

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.train import run_training
from tests.conftest import SECRET
from tests.system.conftest import final_fingerprint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where nothing may be left."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_two_parts(tables: dict, name: str, **how: bool) -> str:
    checkpoint = {"every": 1, "keep": 2}
    run_training(Recipe.parse({**tables, "name": name, "rounds": 2, "checkpoint": checkpoint}), **how)
    return final_fingerprint(Recipe.parse({**tables, "name": name, "checkpoint": checkpoint}), resume=True, **how)


@pytest.mark.thorough
def test_a_serial_run_in_an_object_store_resumes_to_the_bits_of_a_disk(
    tables: dict, bucket: str, home: Path, capfd: pytest.CaptureFixture
) -> None:
    tables |= {"rounds": 3, "max_policy_lag": 1}
    on_disk = final_fingerprint(Recipe.parse({**tables, "name": "disk"}), serial=True)
    tables |= {"output_dir": f"{bucket}/runs", "trackers": [{"name": "tensorboard"}]}
    assert in_two_parts(tables, "remote", serial=True) == on_disk
    folder = RunFolder(f"{bucket}/runs/remote")
    assert [json.loads(line)["round"] for line in folder.storage.read("metrics.jsonl").splitlines()] == [0, 1, 2]
    assert {"checkpoints", "lora", "metrics.jsonl", "recipe.toml", "tensorboard"} <= set(folder.storage.names())
    assert "lease.json" not in folder.storage.names() and folder.storage.names("tensorboard")
    assert Ledger(folder.storage, RolloutsTable()).rounds() == [0, 1, 2]
    assert cli.main(["replay", folder.location, "--round", "2"]) == 0
    assert folder.checkpoints.names() == ["latest", "round-000002", "round-000003"]
    written = [path for path in home.rglob("*") if path.is_file() and "model" not in str(path)]
    assert all("runs/disk" in str(path) for path in written), "all of the remote run is in the object store"
    printed = "".join(capfd.readouterr())
    assert SECRET not in printed and "testing-key" not in printed
    assert SECRET.encode() not in folder.storage.read("recipe.toml")


@pytest.mark.thorough
def test_report_and_sample_read_a_run_from_an_object_store(
    tables: dict, bucket: str, home: Path, capsys: pytest.CaptureFixture
) -> None:
    tables |= {"rounds": 1, "output_dir": f"{bucket}/runs", "evaluation": {"images": 4, "batch_size": 4}}
    run_training(Recipe.parse(tables), serial=True)
    assert cli.main(["report", f"{bucket}/runs/tiny"]) == 0
    assert f"{bucket}/runs/tiny/report/summary.json" in capsys.readouterr().out
    report = RunFolder(f"{bucket}/runs/tiny").report
    assert report.names() == ["before_after.png", "report.html", "reward_curve.png", "summary.json"]
    assert json.loads(report.read("summary.json"))["images_compared"] == 4
    for place in ("", "/lora", "/lora/pytorch_lora_weights.safetensors"):
        recipe = ["--recipe", "recipe.toml"] if place else []
        (home / "recipe.toml").write_bytes(RunFolder(f"{bucket}/runs/tiny").storage.read("recipe.toml"))
        lora = f"{bucket}/runs/tiny{place}"
        assert cli.main(["sample", "--lora", lora, *recipe, "--output", f"out{place.count('/')}", "fox"]) == 0
    images = [(home / f"out{depth}" / "000-fox-seed0.png").read_bytes() for depth in range(3)]
    assert images[0] == images[1] == images[2]


def test_a_run_that_is_not_in_the_object_store_is_named(bucket: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", f"{bucket}/runs/nothing"]) == 2
    assert re.search(rf"{bucket}/runs/nothing is no run's folder", capsys.readouterr().err)
