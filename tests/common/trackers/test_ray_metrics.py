"""Metrics as Ray's: names that Prometheus takes, no unbounded number of series, and nothing without a cluster."""

from pathlib import Path

import pytest
import ray
from ray.util.metrics import _is_invalid_metric_name

from ray_ddpo.common.trackers.ray_metrics import RayMetrics, RaySeries, series_of
from ray_ddpo.common.trackers.tracker import RunInfo


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("kl_nats", "ddpo_kl_nats"),
        ("reward/mean", "ddpo_reward_mean"),
        ("driver/rss_bytes", "ddpo_driver_rss_bytes"),
        ("reward/my-reward v1.5/mean", "ddpo_reward_my_reward_v1_5_mean"),
        ("evaluation/Größe/mean", "ddpo_evaluation_Gr__e_mean"),
    ],
)
def test_a_gauge_has_the_metrics_name_without_what_prometheus_forbids(metric: str, name: str) -> None:
    assert series_of(metric) == (RaySeries(name, "gauge"),)
    assert not _is_invalid_metric_name(name)


def test_what_counts_is_a_counter() -> None:
    names = ("images", "images_dropped", "optimizer_steps", "optimizer_steps_skipped")
    assert [series_of(name)[0].kind for name in names] == ["counter"] * 4


def test_reason_role_and_step_are_tags_so_that_a_new_one_is_no_new_metric() -> None:
    assert series_of("retries/reward timed out") == (
        RaySeries("ddpo_retries", "counter", {"reason": "reward timed out"}),
    )
    of_all_samplers = {"role": "sampler", "index": "all"}
    assert series_of("actor_restarts/sampler") == (RaySeries("ddpo_actor_restarts", "counter", of_all_samplers),)
    assert series_of("kl_nats/step_07") == (RaySeries("ddpo_kl_nats_step", "gauge", {"step": "07"}),)


@pytest.mark.parametrize("metric", ["seconds/learn", "lag/max"])
def test_seconds_and_lag_have_a_histogram_and_the_last_rounds_own_value(metric: str) -> None:
    histogram, last = series_of(metric)
    assert (histogram.name, histogram.kind) == (f"ddpo_{metric.replace('/', '_')}", "histogram")
    assert (last.name, last.kind) == (f"{histogram.name}_last", "gauge")
    assert list(histogram.boundaries) == sorted(histogram.boundaries) and histogram.boundaries[0] > 0


def test_prompts_which_have_no_bound_are_left_out() -> None:
    assert series_of("reward/prompt/a photo of a cat") == ()


@pytest.mark.parametrize(
    ("trackers", "said"),
    [
        ([{"name": "ray"}], "tracker ray: this run is on no Ray cluster, so its metrics are not exported to Ray\n"),
        ([{"name": "wandb"}], ""),
    ],
)
def test_without_a_cluster_it_says_so_to_who_named_it_and_the_run_goes_on(
    trackers: list[dict], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    live = RayMetrics().start(RunInfo("tiny", tmp_path, {"trackers": trackers}, 3, 0))
    live.log({"round": 0.0})
    live.finish()
    assert capsys.readouterr().err == said
