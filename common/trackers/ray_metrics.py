"""Metrics through Ray, whose nodes give them to Prometheus: gauges, and counters and histograms where a sum tells more."""

import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package

Kind = Literal["counter", "gauge", "histogram"]
NAME = "ray"
TAGS = ("run", "role", "index")
COUNTED = {"images", "images_dropped", "optimizer_steps", "optimizer_steps_skipped"}
# The last part of these names is a tag: what it may be is not known beforehand, and one graph shows them all.
FAMILIES: dict[str, tuple[str, str, Kind]] = {
    "retries/": ("retries", "reason", "counter"),
    "actor_restarts/": ("actor_restarts", "role", "counter"),
    "kl_nats/step_": ("kl_nats_step", "step", "gauge"),
    "clip_fraction/step_": ("clip_fraction_step", "step", "gauge"),
}
# Prompts have no bound, and every node would hold and show each one's series for as long as the run lives.
LEFT_OUT = ("reward/prompt/",)
BOUNDARIES = {
    "seconds/": [0.01 * 2**power for power in range(24)],  # 0.01 s … 23 h
    "lag/": [0.5, 1.5, 2.5, 4.5, 8.5, 16.5],
}


@dataclass(frozen=True)
class Series:
    """What a metric is to Ray. Ray puts `ray_` before the name and, behind a counter's, `_total`."""

    name: str
    kind: Kind
    tags: dict[str, str] = field(default_factory=dict)  # beside the run's
    boundaries: tuple[float, ...] = ()


ROUNDS = Series("ddpo_rounds", "counter")


def series_of(metric: str) -> tuple[Series, ...]:
    """The series that a metric's value of a round goes to; none for what is left out."""
    if metric.startswith(LEFT_OUT):
        return ()
    for prefix, (family, tag, kind) in FAMILIES.items():
        if metric.startswith(prefix):
            tags = {tag: metric.removeprefix(prefix)} | ({"index": "all"} if tag == "role" else {})
            return (Series(ray_name(family), kind, tags),)
    if metric in COUNTED:
        return (Series(ray_name(metric), "counter"),)
    for prefix, boundaries in BOUNDARIES.items():
        if metric.startswith(prefix):
            # Ray sums the middles of a histogram's buckets: only a gauge has the round's own value.
            histogram = Series(ray_name(metric), "histogram", boundaries=tuple(boundaries))
            return histogram, Series(ray_name(metric) + "_last", "gauge")
    return (Series(ray_name(metric), "gauge"),)


def ray_name(metric: str) -> str:
    """`ddpo_` and the metric's name, with `_` for what Prometheus forbids in one."""
    return "ddpo_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


class ExportedMetrics(LiveTracker):
    """The driver's metrics in Ray. A node shows them within about ten seconds, and until the driver ends."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "role": "driver", "index": "0"}
        self._metrics: dict[str, Any] = {}

    def log(self, metrics: Metrics) -> None:
        self._record(ROUNDS, 1.0)
        for metric, value in metrics.items():
            # What is not finite would not be shown, and would spoil a sum: the value of the round before stays.
            for series in series_of(metric) if math.isfinite(value) else ():
                self._record(series, value)

    def finish(self) -> None:
        """Ray holds the last values, and lets go of them when the driver ends."""

    def _record(self, series: Series, value: float) -> None:
        if series.name not in self._metrics:
            self._metrics[series.name] = _metric(series)
        metric, tags = self._metrics[series.name], {**self._tags, **series.tags}
        if series.kind == "counter":
            if value > 0:  # Ray refuses to count by nothing
                metric.inc(value, tags)
        elif series.kind == "histogram":
            metric.observe(value, tags)
        else:
            metric.set(value, tags)


def _metric(series: Series) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    keys = (*TAGS, *(tag for tag in series.tags if tag not in TAGS))
    described = "What it means is in docs/metrics.md."
    if series.kind == "histogram":
        return Histogram(series.name, described, boundaries=list(series.boundaries), tag_keys=keys)
    return {"counter": Counter, "gauge": Gauge}[series.kind](series.name, described, tag_keys=keys)


class NothingExported(LiveTracker):
    """A run without Ray has no node that could show its metrics."""

    def log(self, metrics: Metrics) -> None:
        """Nowhere to go."""

    def finish(self) -> None:
        """Nothing is open."""


class RayMetrics(Tracker):
    """Metrics in Ray, for Prometheus and Grafana, tagged with the run's name, role and index. It has no keys."""

    def check(self) -> None:
        require_package(NAME, "ray")

    def start(self, run: RunInfo) -> LiveTracker:
        import ray

        if ray.is_initialized():
            return ExportedMetrics(run.name)
        if any(table["name"] == NAME for table in run.recipe.get("trackers", ())):  # somebody wants it
            print("tracker ray: this run is on no Ray cluster, so its metrics are not exported to Ray", file=sys.stderr)
        return NothingExported()
