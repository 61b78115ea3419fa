"""Metrics on the terminal: a progress bar, or one plain line per round if the output goes elsewhere."""

import sys
import time
from datetime import timedelta

from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker

SATURATED = 0.5  # share of images with the best possible reward from which the line says so


class TimeLeft:
    """An estimate of the remaining time from the rounds since this start."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._start = time.monotonic()

    def after(self, rounds_done: int) -> timedelta:
        """Return the remaining time in whole seconds at the mean speed so far.

        `rounds_done` counts all rounds of the run.
        """
        seconds = (time.monotonic() - self._start) / (rounds_done - self._run.first_round)
        return timedelta(seconds=round(seconds * (self._run.rounds - rounds_done)))


class Bar(LiveTracker):
    """A progress bar at the bottom of the terminal."""

    def __init__(self, run: RunInfo) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        round_column, stats_column = (
            TextColumn("round {task.completed}/{task.total}"),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(round_column, BarColumn(), TimeElapsedColumn(), stats_column, refresh_per_second=1)
        self._time_left = TimeLeft(run)
        self._progress.console.print(settings_line(run), markup=False, highlight=False)
        self._row = self._progress.add_task("sampling", total=run.rounds, completed=run.first_round)
        self._rate_changes = rate_changes(run)
        self._progress.start()

    def log(self, metrics: Metrics) -> None:
        done = int(metrics["round"]) + 1
        self._progress.update(
            self._row,
            completed=done,
            description=stats_line(metrics, self._time_left.after(done), self._rate_changes),
            refresh=True,
        )

    def finish(self) -> None:
        self._progress.stop()


class PlainLines(LiveTracker):
    """Plain lines for a file or a job's log."""

    def __init__(self, run: RunInfo) -> None:
        self._rounds = run.rounds
        self._time_left = TimeLeft(run)
        self._rate_changes = rate_changes(run)
        print(settings_line(run), flush=True)

    def log(self, metrics: Metrics) -> None:
        done = int(metrics["round"]) + 1
        print(f"round {done}/{self._rounds}  {self._stats(metrics, done)}", flush=True)

    def _stats(self, metrics: Metrics, done: int) -> str:
        return stats_line(metrics, self._time_left.after(done), self._rate_changes)

    def finish(self) -> None:
        """Do nothing, because every line is flushed."""


class Terminal(Tracker):
    """Progress bar on a terminal, plain lines in a file or a job's log. It has no keys."""

    def start(self, run: RunInfo) -> LiveTracker:
        return Bar(run) if sys.stdout.isatty() else PlainLines(run)


def settings_line(run: RunInfo) -> str:
    """Describe the run in one line."""
    recipe = run.recipe
    images = recipe["sampling"]["batch_size"] * recipe["sampling"]["batches_per_round"]
    rewards = [reward["name"] for reward in recipe["rewards"] or [recipe["reward"]]]
    policy = " ".join(str(recipe["policy"][key]) for key in ("name", "model") if key in recipe["policy"])
    start = f" from round {run.first_round + 1}" if run.first_round else ""
    rounds = "1 round" if run.rounds == 1 else f"{run.rounds} rounds"
    return (
        f"{run.name}: {rounds} of {images} images{start}, policy {policy}, reward {' + '.join(rewards)}, "
        f"algorithm {recipe['algorithm']['name']}, in {run.folder}"
    )


def rate_changes(run: RunInfo) -> bool:
    """Return whether the run's recipe has a warmup or a schedule of the learning rate."""
    learner = run.recipe.get("learner", {})
    return learner.get("warmup_steps", 0) > 0 or learner.get("learning_rate_schedule", "constant") != "constant"


def stats_line(metrics: Metrics, left: timedelta, with_rate: bool = False) -> str:
    """Return the mean reward with its remarks, the throughput, the MFU if it is known, and the remaining time.

    Args:
        metrics: of the round.
        left: the remaining time.
        with_rate: show the learning rate, too.
    """
    throughput = f"{metrics['images_per_second']:.3g} images/s{_utilization(metrics)}  {left} left"
    rate = f"  learning rate {metrics['learning_rate']:.3g}" if with_rate and "learning_rate" in metrics else ""
    within = f" ± {metrics['reward/group_std']:.2g} in a group" if "reward/group_std" in metrics else ""
    spread = f"{within}{_without_spread(metrics)}{_saturated(metrics)}"
    agrees = "preference_accuracy"
    preferences = f"  preference accuracy {100 * metrics[agrees]:.0f} %" if agrees in metrics else ""
    return f"reward {metrics['reward/mean']:.4g}{spread}{preferences}{rate}  {throughput}"


def _utilization(metrics: Metrics) -> str:
    """Return the samplers' and the learner's MFU in brackets; empty if neither is known."""
    known = {"sampling": metrics.get("mfu/sampler"), "learning": metrics.get("mfu/learner")}
    parts = [f"{side} {100 * share:.0f} %" for side, share in known.items() if share is not None]
    return f" (MFU {', '.join(parts)})" if parts else ""


def _without_spread(metrics: Metrics) -> str:
    """Return a remark if some groups have equal rewards, from which nothing can be learned, or a refill lacks groups."""
    if lacking := metrics.get("refill/lacking", 0.0):
        return f" ({lacking:.0f} {'group lacks' if lacking == 1 else 'groups lack'} different rewards after the refill)"
    share = metrics.get("reward/zero_std_groups", 0.0)
    if share == 1:
        return " (all rewards of a group are equal: nothing to learn from)"
    return f" ({100 * share:.0f} % of groups have equal rewards)" if share else ""


def _saturated(metrics: Metrics) -> str:
    """Return a remark if most images have the best reward that they can have."""
    share = metrics.get("reward/saturation", 0.0)
    return f" ({100 * share:.0f} % of images have the best reward)" if share >= SATURATED else ""
