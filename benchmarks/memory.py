"""Sample the memory of processes over time, fit its growth, and plot both."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MEGABYTE = 1e6
SETTLING_SHARE = 0.2  # of a process's life: libraries are loaded, caches filled
SETTLING_SECONDS = 120.0  # at most
FEWEST_SAMPLES = 15
MARKS = {"killed": "tab:red", "scaled": "tab:blue", "driver": "black"}


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    role: str
    pid: int
    seconds: float  # since the soak began
    resident: float  # MB
    private: float  # MB: resident without pages shared with the object store and other processes


@dataclass(frozen=True)
class Event:
    """A disturbance of the run."""

    kind: str  # of MARKS
    seconds: float
    what: str


@dataclass(frozen=True)
class Growth:
    """The least-squares line of one process."""

    role: str
    pid: int
    first: float  # seconds that it was fitted over
    last: float
    samples: int
    resident: float  # MB a minute
    private: float
    offset: float  # private MB at 0 seconds


def sample(role: str, process: psutil.Process, seconds: float) -> Sample | None:
    """Return a process's memory, or None if the process has just ended."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return None
    return Sample(role, process.pid, seconds, memory.rss / MEGABYTE, (memory.rss - memory.shared) / MEGABYTE)


def growths(samples: list[Sample]) -> list[Growth]:
    """Fit a line for every process that lived long enough, in order of time."""
    found = []
    for role, pid in dict.fromkeys((each.role, each.pid) for each in samples):
        own = [each for each in samples if (each.role, each.pid) == (role, pid)]
        life = own[-1].seconds - own[0].seconds
        settled = own[0].seconds + min(SETTLING_SECONDS, SETTLING_SHARE * life)
        own = [each for each in own if each.seconds >= settled]
        if len(own) >= FEWEST_SAMPLES:
            found.append(_growth(own))
    return found


def _growth(own: list[Sample]) -> Growth:
    seconds = np.array([each.seconds for each in own])
    resident, _ = np.polyfit(seconds, [each.resident for each in own], 1)
    private, offset = np.polyfit(seconds, [each.private for each in own], 1)
    first, last = own[0], own[-1]
    slopes = 60 * float(resident), 60 * float(private)
    return Growth(first.role, first.pid, first.seconds, last.seconds, len(own), *slopes, float(offset))


def chart(path: Path, title: str, samples: list[Sample], events: list[Event]) -> None:
    """Plot one panel per role: resident and private memory, least-squares lines, and marks for disturbances."""
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(each.role for each in samples))
    figure = Figure(figsize=(11, 3.4 * len(roles)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(len(roles), 1, sharex=True, squeeze=False)[:, 0]
    for role, panel in zip(roles, panels, strict=True):
        _panel(panel, role, [each for each in samples if each.role == role], events)
    panels[-1].set_xlabel("minutes")
    panels[0].legend(*_once(panels[0]), loc="lower left", bbox_to_anchor=(0, 1.08), ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _panel(panel: Any, role: str, samples: list[Sample], events: list[Event]) -> None:
    """Plot the processes of one role and the marks of disturbances."""
    for kind, colour in MARKS.items():
        for event in (event for event in events if event.kind == kind):
            width, alpha = (1.5, 1.0) if kind == "driver" else (0.7, 0.5)
            panel.axvline(event.seconds / 60, color=colour, linewidth=width, alpha=alpha, label=_name(kind))
    curves: list[tuple[str, str, Callable[[Sample], float]]] = [
        ("resident", "tab:purple", lambda each: each.resident),
        ("without shared pages", "tab:green", lambda each: each.private),
    ]
    for pid in dict.fromkeys(each.pid for each in samples):
        own = [each for each in samples if each.pid == pid]
        for label, colour, value in curves:
            minutes = [each.seconds / 60 for each in own]
            panel.plot(minutes, [value(each) for each in own], color=colour, linewidth=1.4, label=label)
    for growth in growths(samples):
        ends = np.array([growth.first, growth.last]) / 60
        line = growth.offset + growth.private * ends
        panel.plot(ends, line, color="black", linestyle="--", linewidth=1, label="least squares")
        panel.annotate(
            f"{growth.private:+.2f} MB/min", (ends.mean(), line.mean()), (0, -14), textcoords="offset points"
        )
    panel.set(title=role, ylabel="MB", xlim=(0, None), ylim=(0, None))


def _name(kind: str) -> str:
    return {"killed": "a worker is killed", "scaled": "scaled", "driver": "the driver is killed or stopped"}[kind]


def _once(panel: Any) -> tuple[list[Any], list[str]]:
    """Return handles and labels for a legend that names each thing once."""
    named = {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    return list(named.values()), list(named)
