"""Metrics for whoever watches: a bar on a terminal, and one plain line a round where the output goes elsewhere."""

import sys
import time
from datetime import timedelta

from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker, require_package


class TimeLeft:
    """From the rounds since this start, which include waiting, to the time that the other rounds will take."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._start = time.monotonic()

    def after(self, rounds_done: int) -> timedelta:
        """In whole seconds, at the mean pace so far. `rounds_done`: of the whole run."""
        seconds = (time.monotonic() - self._start) / (rounds_done - self._run.first_round)
        return timedelta(seconds=round(seconds * (self._run.rounds - rounds_done)))


class Bar(LiveTracker):
    """A progress bar that stays at the foot of the terminal."""

    def __init__(self, run: RunInfo) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        round_column, figures_column = (
            TextColumn("round {task.completed}/{task.total}"),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(round_column, BarColumn(), TimeElapsedColumn(), figures_column, refresh_per_second=1)
        self._time_left = TimeLeft(run)
        self._progress.console.print(settings_line(run), markup=False, highlight=False)
        self._row = self._progress.add_task("sampling", total=run.rounds, completed=run.first_round)
        self._progress.start()

    def log(self, metrics: Metrics) -> None:
        done = int(metrics["round"]) + 1
        self._progress.update(
            self._row, completed=done, description=figures(metrics, self._time_left.after(done)), refresh=True
        )

    def finish(self) -> None:
        self._progress.stop()


class PlainLines(LiveTracker):
    """Lines for a file or a job's log, where a bar would be a mess."""

    def __init__(self, run: RunInfo) -> None:
        self._rounds = run.rounds
        self._time_left = TimeLeft(run)
        print(settings_line(run), flush=True)

    def log(self, metrics: Metrics) -> None:
        done = int(metrics["round"]) + 1
        print(f"round {done}/{self._rounds}  {figures(metrics, self._time_left.after(done))}", flush=True)

    def finish(self) -> None:
        """Every line is out."""


class Terminal(Tracker):
    """Progress bar on a terminal, plain lines in a file or a job's log. It has no keys."""

    def check(self) -> None:
        require_package("terminal", "rich")

    def start(self, run: RunInfo) -> LiveTracker:
        return Bar(run) if sys.stdout.isatty() else PlainLines(run)


def settings_line(run: RunInfo) -> str:
    """What is about to run, in one line."""
    recipe = run.recipe
    images = recipe["sampling"]["batch_size"] * recipe["sampling"]["batches_per_round"]
    rewards = [reward["name"] for reward in recipe["rewards"] or [recipe["reward"]]]
    policy = " ".join(str(recipe["policy"][key]) for key in ("name", "model") if key in recipe["policy"])
    start = f" from round {run.first_round + 1}" if run.first_round else ""
    return (
        f"{run.name}: {run.rounds} rounds of {images} images{start}, policy {policy}, reward {' + '.join(rewards)}, "
        f"algorithm {recipe['algorithm']['name']}, in {run.folder}"
    )


def figures(metrics: Metrics, left: timedelta) -> str:
    """The numbers that tell whether it learns and how long it takes."""
    pace = f"{metrics['images_per_second']:.3g} images/s  {left} left"
    return f"reward {metrics['reward/mean']:.4g}{_without_spread(metrics)}  {pace}"


def _without_spread(metrics: Metrics) -> str:
    """Return a remark if groups of images have equal rewards, of which nothing can be learned."""
    share = metrics.get("reward/zero_std_groups", 0.0)
    if share == 1:
        return " (all rewards of a group are equal: nothing to learn from)"
    return f" ({100 * share:.0f} % of groups have equal rewards)" if share else ""
