"""Prompts with metadata on Ray: the reward gets them, and a resume and one process give the same bits."""

import json
import os
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RolloutsTable
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.storage import Storage
from tests.system.conftest import final_fingerprint
from tests.system.drivers import Driver, committed_fingerprint


@pytest.mark.rotated(every=2, group="longest")
@pytest.mark.thorough
def test_metadata_of_a_file_reaches_rewards_on_ray_and_after_a_resume(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    rows = [{"prompt": f"a cat, number {at}", "bonus": at, "about": {"boxes": [[at, 0.1]]}} for at in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    tables |= {
        "prompts": {"name": "file", "path": str(tmp_path / "prompts.jsonl")},
        "reward": {"name": "function", "path": "tests.user_functions:prompts_and_metadata"},
        "evaluation": {"every": 1, "images": 4},
        "samplers": {"count": 2},
        "checkpoint": {"every": 1},
    }
    tables["policy"] |= {"height": 24, "width": 16}
    recipe = Recipe.parse({**tables, "name": "ray"})
    for rounds in ("1", "2"):
        driver = Driver(recipe, tmp_path, "--rounds", rounds, "--resume", "auto")
        assert driver.ended() == 0, driver.said()
    said = driver.said()
    assert said.count("prompts: 5 of 5 are longer than a text encoder reads") == 2, "once each start, by one sampler"
    assert committed_fingerprint(recipe) == final_fingerprint(Recipe.parse({**tables, "name": "one"}), serial=True)
    for name in ("ray", "one"):
        for row in Ledger(Storage(tmp_path / "runs" / name), RolloutsTable()).read(1).to_pylist():
            metadata = json.loads(row["metadata"])
            assert metadata["about"] == {"boxes": [[metadata["bonus"], 0.1]]}
            assert row["reward"] == len(row["prompt"]) + metadata["bonus"]
