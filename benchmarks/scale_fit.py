"""Fit least-squares lines through the scale benchmark's measurements; format its tables and chart."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_stand_ins import Setting

# What a round is made of, in the units that a cost is given in.
SIZES = {
    "round": lambda setting: 1.0,
    "task": lambda setting: setting.tasks,
    "image": lambda setting: setting.images,
    "sampler": lambda setting: setting.samplers,
    "MB of weights": lambda setting: setting.weight_bytes / 1e6,
    "task and further rank": lambda setting: setting.tasks * (setting.ranks - 1),
    "MB sampled": lambda setting: setting.images * (setting.trajectory_bytes + setting.image_bytes) / 1e6,
}
ROUNDING = 1e-9  # of the solution
FITTED = ("driver_cpu", "cluster_cpu", "driver_peak")
ON_PAPER = (
    Setting(1024, 8, samplers=16),
    Setting(65_536, 8, samplers=256),
    Setting(1_000_000, 8, samplers=10_000),
    Setting(1_000_000, 64, samplers=10_000),
    Setting(65_536, 8, samplers=936, ranks=64),
)


@dataclass(frozen=True)
class Cost:
    """Cost of a round in one setting, as means over the measured rounds."""

    seconds: float  # per round, minus the time of samplers that are never idle
    driver_cpu: float  # seconds of the driver's process, Ray's threads in it included
    driver_python: float  # of these, in the thread that runs Python
    cluster_cpu: float  # seconds of Ray's own processes: GCS, raylet, agents
    driver_peak: float  # MB: the highest resident memory over that before the first round
    stored: float  # MB per round written to the object store


@dataclass(frozen=True)
class Measured:
    """A setting on an axis, and its cost."""

    axis: str
    setting: Setting
    cost: Cost

    @classmethod
    def of(cls, axis: str, setting: Setting, cost: dict[str, float]) -> "Measured":
        """Build from the measuring process's output."""
        return cls(axis, setting, Cost(**cost))

    @property
    def value(self) -> int:
        """Return the value of the varied size."""
        return getattr(self.setting, self.axis)

    @property
    def row(self) -> dict[str, Any]:
        """Return the CSV's row."""
        own = {"axis": self.axis, "value": self.value}
        return {**own, **dataclasses.asdict(self.setting), "tasks": self.setting.tasks, **dataclasses.asdict(self.cost)}


def least_squares(sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return non-negative costs per unit of each column of `sizes`, fitted on relative errors.

    A negative cost is noise about 0. Drop such columns, the most negative first.
    """
    shares = sizes / np.maximum(costs, 1e-9)[:, None]
    lengths = np.linalg.norm(shares, axis=0)
    kept = [column for column in range(sizes.shape[1]) if lengths[column]]
    while True:
        found, *_ = np.linalg.lstsq(shares[:, kept] / lengths[kept], np.ones(len(costs)), rcond=None)
        if not kept or found.min() >= -ROUNDING * np.abs(found).max():
            break
        kept.pop(int(found.argmin()))
    costs_a_unit = np.zeros(sizes.shape[1])
    costs_a_unit[kept] = found.clip(0) / lengths[kept]
    return costs_a_unit


def fitted(found: list[Measured]) -> dict[str, dict[str, float]]:
    """Return, for each name in FITTED, the cost per round, task, image …, fitted over all settings."""
    sizes = np.array([[size(each.setting) for size in SIZES.values()] for each in found], float)
    costs = {name: np.array([getattr(each.cost, name) for each in found]) for name in FITTED}
    return {name: dict(zip(SIZES, least_squares(sizes, values), strict=True)) for name, values in costs.items()}


def on_paper(costs: dict[str, dict[str, float]], setting: Setting) -> dict[str, float]:
    """Return the fitted costs of a setting."""
    return {name: sum(a_unit[size] * SIZES[size](setting) for size in SIZES) for name, a_unit in costs.items()}


def table(found: list[Measured]) -> str:
    """Return all settings as a Markdown table."""
    heads = ("varied", "", "tasks", "seconds a round", "driver, CPU s", "µs a task", "Ray's processes, CPU s")
    heads = (*heads, "driver's peak, MB", "stored, MB")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for each in found:
        cost, tasks = each.cost, each.setting.tasks
        clocks = f"{cost.seconds:.2f} | {cost.driver_cpu:.3f} | {1e6 * cost.driver_cpu / tasks:,.0f}"
        memory = f"{cost.cluster_cpu:.2f} | {cost.driver_peak:.0f} | {cost.stored:.0f}"
        lines.append(f"| {each.axis} | {each.value:,} | {tasks:,} | {clocks} | {memory} |")
    return "\n".join(lines)


def costs_table(costs: dict[str, dict[str, float]]) -> str:
    """Return the fitted costs as a Markdown table."""
    lines = ["| a | driver, CPU | Ray's processes, CPU | driver's memory |", "|---|---|---|---|"]
    for size in SIZES:
        driver, cluster, memory = (costs[name][size] for name in FITTED)
        lines.append(f"| {size} | {1e6 * driver:,.1f} µs | {1e6 * cluster:,.1f} µs | {1e3 * memory:,.2f} kB |")
    return "\n".join(lines)


def on_paper_table(costs: dict[str, dict[str, float]]) -> str:
    """Return the fitted costs of larger rounds as a Markdown table."""
    heads = "images | images a task | samplers | ranks | driver, CPU s | Ray's processes, CPU s | driver's memory, GB"
    lines = [f"| {heads} |", "|---|---|---|---|---|---|---|"]
    for setting in ON_PAPER:
        driver, cluster, memory = on_paper(costs, setting).values()
        sizes = f"{setting.images:,} | {setting.images_per_task} | {setting.samplers:,} | {setting.ranks}"
        lines.append(f"| {sizes} | {driver:,.1f} | {cluster:,.1f} | {memory / 1e3:,.2f} |")
    return "\n".join(lines)


def chart(path: Path, title: str, found: list[Measured]) -> None:
    """Plot one panel per axis."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(each.axis for each in found))
    columns = min(4, len(axes))
    figure = Figure(figsize=(3.6 * columns, 3.2 * -(-len(axes) // columns)), layout="constrained")
    figure.suptitle(f"CPU seconds a round that the system itself costs; {title}", fontsize=9)
    panels = figure.subplots(-(-len(axes) // columns), columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(axes) :]:
        panel.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        own = [each for each in found if each.axis == axis]
        for name, label in (("driver_cpu", "driver"), ("cluster_cpu", "Ray's processes")):
            values = [getattr(each.cost, name) for each in own]
            panel.plot([each.value for each in own], values, marker="o", markersize=3, label=label)
        panel.set(title=axis.replace("_", " "), xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU s a round")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
