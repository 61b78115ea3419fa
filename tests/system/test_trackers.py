"""A run with every tracker, killed and resumed: one history each, and no secret in the files."""

import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_ddpo.common.recipe.recipe import Recipe
from tests.shown_rounds import fingerprint, run, shown_in
from tests.system.disturbances import rounds_done, wait_until
from tests.system.drivers import Driver
from tests.wandb_history import history, pixels_of, starts, tables_of

ROUNDS = 12
SECRETS = {"WANDB_API_KEY": "never0shown" * 4, "HF_TOKEN": "hf_never_to_be_shown"}


@pytest.mark.system
def test_a_killed_run_resumes_in_the_same_wandb_run_with_every_round_once(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    tables |= {
        "rounds": ROUNDS,
        "sampling": {**tables["sampling"], "batch_size": 2},
        "checkpoint": {"every": 5},
        "evaluation": {"every": 6, "images": 2, "saved_images": 2},
        "media": {"every": 2, "images": 3},
    }
    recipe = Recipe.parse({**tables, "trackers": [{"name": "wandb"}, {"name": "tensorboard"}]})
    folder = Path(recipe.run_path())
    driver = Driver(recipe, tmp_path, "--serial")
    wait_until(lambda: rounds_done(folder) >= 7, "round 7")
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.ended()
    before = rounds_done(folder)
    assert 7 <= before < 10, "it was killed between the checkpoint of round 5 and the next"
    assert Driver(recipe, tmp_path, "--serial", "--resume", "auto").ended() == 0

    rows = history(folder)
    assert [row["round"] for row in rows] == [row["_step"] for row in rows] == list(range(ROUNDS))
    assert len(starts(folder)) == 2 and len({file.name for file in starts(folder)}) == 1
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/mean"] for row in rows] == [row["reward/mean"] for row in logged]
    evaluated = [row["round"] for row in rows if "images/evaluation/count" in row]
    assert evaluated == [row["round"] for row in logged if "evaluation/policy_version" in row] != []
    shown = [row for row in rows if "images/round/count" in row]
    # wandb's file is written every second: what a kill loses of it is filled up with metrics, and not with images.
    assert {0, 10, 11} <= {row["round"] for row in shown} <= {0, 2, 4, 6, 8, 10, 11}
    assert pixels_of(folder, shown[-1]["images/round/filenames"][2]).shape == (16, 16, 3)
    assert len(tables_of(folder, "tables/evaluation")) >= 1

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == list(range(ROUNDS))
    assert [event.step for event in events.Images("images/round/02")] == [0, 2, 4, 6, 8, 10, 11]

    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written and not [
        path for path in written for secret in SECRETS.values() if secret.encode() in path.read_bytes()
    ]
    assert not any(secret in driver.said() for secret in SECRETS.values())


@pytest.mark.thorough
def test_on_ray_with_two_samplers_the_same_is_shown(tables: dict, cluster: None) -> None:
    serial = run(tables, "serial", True)
    ray = run(tables, "ray", False, samplers={"count": 2}, max_policy_lag=0)
    assert shown_in(ray) == shown_in(serial) and fingerprint(ray) == fingerprint(serial)
