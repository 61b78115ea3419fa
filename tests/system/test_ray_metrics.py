"""Metrics of the Ray tracker, read from the node's metrics port like Prometheus."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trackers.ray_metrics import RayMetrics
from ray_ddpo.common.trackers.tracker import RunInfo
from ray_ddpo.train import run_training

pytestmark = pytest.mark.system
LINE = re.compile(r"^ray_(ddpo_\w+)\{(.*)\} (\S+)$")


def shown(run: str) -> dict[str, float]:
    """A run's series as the node shows them now: by name, with the tags that are neither Ray's nor every series'."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found = {}
    for line in urllib.request.urlopen(address, timeout=5).read().decode().splitlines():
        if match := LINE.match(line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            if tags.get("run") == run:
                own = [f"{tag}={tags[tag]}" for tag in ("role", "index", "reason", "step", "le") if tag in tags]
                found[" ".join([match[1], *own])] = float(match[3])
    return found


def shown_once_there(run: str, series: str, value: float) -> dict[str, float]:
    """All of a run's series as soon as one has its value; Ray brings them to the node every ten seconds."""
    deadline = time.monotonic() + 30
    while (found := shown(run)).get(series) != value:
        assert time.monotonic() < deadline, f"after 30 s {series} is not {value} in {found}"
        time.sleep(0.5)
    return found


def test_what_is_logged_is_shown_by_the_node(cluster: None, tmp_path: Path) -> None:
    live = RayMetrics().start(RunInfo("logged", tmp_path, {}, 3, 0))
    first = {"round": 0.0, "reward/mean": -1.5, "images": 8.0, "retries/timeout": 2.0, "actor_restarts/sampler": 1.0}
    live.log({**first, "seconds/learn": 3.0, "kl_nats/step_03": 0.25, "grad_norm": 2.0})
    live.log({"round": 1.0, "reward/mean": 2.5, "images": 8.0, "retries/timeout": 1.0, "actor_restarts/sampler": 0.0})
    live.log({"round": 2.0, "seconds/learn": 7.0, "grad_norm": float("nan"), "reward/prompt/cat": 5.0})
    live.finish()
    own = "role=driver index=0"
    found = shown_once_there("logged", f"ddpo_rounds_total {own}", 3)
    expected = {
        f"ddpo_round {own}": 2,
        f"ddpo_reward_mean {own}": 2.5,
        f"ddpo_images_total {own}": 16,
        f"ddpo_retries_total {own} reason=timeout": 3,
        "ddpo_actor_restarts_total role=sampler index=all": 1,
        f"ddpo_kl_nats_step {own} step=03": 0.25,
        f"ddpo_grad_norm {own}": 2,
        f"ddpo_seconds_learn_last {own}": 7,
        f"ddpo_seconds_learn_count {own}": 2,
        f"ddpo_seconds_learn_bucket {own} le=2.56": 0,
        f"ddpo_seconds_learn_bucket {own} le=5.12": 1,
        f"ddpo_seconds_learn_bucket {own} le=10.24": 2,
    }
    assert {series: found.get(series) for series in expected} == expected
    assert not [series for series in found if "prompt" in series]


def test_a_run_on_ray_shows_its_last_round(cluster: None, tables: dict) -> None:
    recipe = Recipe.parse({**tables, "name": "exported", "trackers": [{"name": "ray"}]})
    run_training(recipe)
    found = shown_once_there("exported", "ddpo_rounds_total role=driver index=0", 2)
    last = json.loads((Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()[-1])
    for metric in ("reward/mean", "loss", "idle/learner", "weight_bytes", "samplers/alive"):
        assert found[f"ddpo_{metric.replace('/', '_')} role=driver index=0"] == last[metric]
    assert found["ddpo_seconds_round_last role=driver index=0"] == last["seconds/round"]
    assert found["ddpo_images_total role=driver index=0"] == 16
