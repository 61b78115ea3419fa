"""Metrics through Ray to Prometheus: gauges, and counters and histograms where a sum is more useful."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker

Kind = Literal["counter", "gauge", "histogram"]
NAME = "ray"
TAGS = ("run", "role", "index")
COUNTED = {"images", "images_dropped", "optimizer_steps", "optimizer_steps_skipped"}
# The last part of these names becomes a tag: its values are not known beforehand, and one graph shows all of them.
FAMILIES: dict[str, tuple[str, str, Kind]] = {
    "retries/": ("retries", "reason", "counter"),
    "actor_restarts/": ("actor_restarts", "role", "counter"),
    "kl_nats/step_": ("kl_nats_step", "step", "gauge"),
    "clip_fraction/step_": ("clip_fraction_step", "step", "gauge"),
}
# The number of prompts is unbounded, and every node would keep a series for each as long as the run lives.
LEFT_OUT = ("reward/prompt/",)
BOUNDARIES = {
    "seconds/": [0.01 * 2**power for power in range(24)],  # 0.01 s … 23 h
    "lag/": [0.5, 1.5, 2.5, 4.5, 8.5, 16.5],
}


@dataclass(frozen=True)
class RaySeries:
    """A metric's name and kind in Ray. Ray adds the prefix `ray_`, and the suffix `_total` for counters."""

    name: str
    kind: Kind
    tags: dict[str, str] = field(default_factory=dict)  # in addition to the run's
    boundaries: tuple[float, ...] = ()


ROUNDS = RaySeries("ddpo_rounds", "counter")


def series_of(metric: str) -> tuple[RaySeries, ...]:
    """Return the series that a metric's values go to; none for a metric that is not exported."""
    if metric.startswith(LEFT_OUT):
        return ()
    for prefix, (family, tag, kind) in FAMILIES.items():
        if metric.startswith(prefix):
            tags = {tag: metric.removeprefix(prefix)} | ({"index": "all"} if tag == "role" else {})
            return (RaySeries(ray_name(family), kind, tags),)
    if metric in COUNTED:
        return (RaySeries(ray_name(metric), "counter"),)
    for prefix, boundaries in BOUNDARIES.items():
        if metric.startswith(prefix):
            # Ray sums bucket midpoints of a histogram, so the round's exact value needs a gauge.
            histogram = RaySeries(ray_name(metric), "histogram", boundaries=tuple(boundaries))
            return histogram, RaySeries(ray_name(metric) + "_last", "gauge")
    return (RaySeries(ray_name(metric), "gauge"),)


def ray_name(metric: str) -> str:
    """Return `ddpo_` and the metric's name, with `_` for characters that Prometheus forbids."""
    return "ddpo_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


class ExportedMetrics(LiveTracker):
    """The driver's metrics in Ray. A node exposes them within about ten seconds, and until the driver ends."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "role": "driver", "index": "0"}
        self._metrics: dict[str, Any] = {}

    def log(self, metrics: Metrics) -> None:
        self._record(ROUNDS, 1.0)
        for metric, value in metrics.items():
            # Skip non-finite values, which would spoil sums; a gauge keeps the previous round's value.
            for series in series_of(metric) if math.isfinite(value) else ():
                self._record(series, value)

    def finish(self) -> None:
        """Keep the last values in Ray, which drops them when the driver ends."""

    def _record(self, series: RaySeries, value: float) -> None:
        """Give Ray one value."""
        if series.name not in self._metrics:
            self._metrics[series.name] = _metric(series)
        metric, tags = self._metrics[series.name], {**self._tags, **series.tags}
        if series.kind == "counter":
            if value > 0:  # Ray refuses an increment of 0
                metric.inc(value, tags)
        elif series.kind == "histogram":
            metric.observe(value, tags)
        else:
            metric.set(value, tags)


def _metric(series: RaySeries) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    keys = (*TAGS, *(tag for tag in series.tags if tag not in TAGS))
    described = "What it means is in docs/metrics.md."
    if series.kind == "histogram":
        return Histogram(series.name, described, boundaries=list(series.boundaries), tag_keys=keys)
    return {"counter": Counter, "gauge": Gauge}[series.kind](series.name, described, tag_keys=keys)


class NothingExported(LiveTracker):
    """The tracker of a run without Ray, where no node could expose metrics."""

    def log(self, metrics: Metrics) -> None:
        """Ignore the metrics."""

    def finish(self) -> None:
        """Do nothing."""


class RayMetrics(Tracker):
    """Metrics in Ray, for Prometheus and Grafana, tagged with the run's name, role and index. It has no keys."""

    def start(self, run: RunInfo) -> LiveTracker:
        import ray

        if ray.is_initialized():
            return ExportedMetrics(run.name)
        if any(table["name"] == NAME for table in run.recipe.get("trackers", ())):  # the recipe asks for it
            print_line("tracker ray: this run is on no Ray cluster, so its metrics are not exported to Ray")
        return NothingExported()
