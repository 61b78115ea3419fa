"""Results of `target.py`: their file, when a side reached the target, the table and the chart."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from benchmarks.against_trl import TRL

OURS = "ours"


@dataclass(frozen=True)
class Point:
    """A version's scores on held-out images, and its time."""

    side: str
    seed: int
    round: int  # done by then; 0: the pretrained model
    seconds: float  # of training
    reward: float
    top1: float


def write_points(points: Iterable[Point], path: Path, machine: str) -> None:
    """Append each point as it arrives."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Point)), "machine"], lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow({**asdict(point), "seconds": f"{point.seconds:.2f}", "machine": machine})
            file.flush()


def read_points(path: Path) -> tuple[list[Point], str]:
    """Return the points, and the machine that produced them."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [
        Point(
            row["side"],
            int(row["seed"]),
            int(row["round"]),
            *(float(row[name]) for name in ("seconds", "reward", "top1")),
        )
        for row in rows
    ]
    return points, rows[0]["machine"]


def curve(points: list[Point], side: str, seed: int) -> list[Point]:
    """Return the points of one training in order."""
    return sorted((each for each in points if (each.side, each.seed) == (side, seed)), key=lambda each: each.round)


def first_past(curve: list[Point], target: float) -> Point | None:
    """Return the first version at or past the target."""
    return next((point for point in curve if point.reward >= target), None)


def table(points: list[Point]) -> str:
    """Return a Markdown table with one line per seed, and the median of the ratios."""
    lines = [
        "| seed | reward before | target | TRL | ours | TRL / ours |",
        "|---|---|---|---|---|---|",
    ]
    ratios = []
    for seed in sorted({point.seed for point in points}):
        trl, ours = curve(points, TRL, seed), curve(points, OURS, seed)
        target = trl[-1].reward
        reached = [first_past(trl, target), first_past(ours, target)]
        assert reached[0] is not None, "TRL's last version is the target"
        quotient = "–"
        if reached[1] is not None:
            ratios.append(reached[0].seconds / reached[1].seconds)
            quotient = f"{ratios[-1]:.2f}"
        change = 100 * (target - trl[0].reward) / abs(trl[0].reward)
        cells = " | ".join(spelled(point) for point in reached)
        lines.append(f"| {seed} | {trl[0].reward:.3f} | {target:.3f} ({change:+.1f} %) | {cells} | {quotient} |")
    return "\n".join(lines) + (f"\n\nmedian: {median(ratios):.2f} ×" if ratios else "")


def spelled(point: Point | None) -> str:
    """Return a cell: minutes, rounds, and the share of animals that are still named."""
    if point is None:
        return "not reached"
    return f"{point.seconds / 60:.2f} min, round {point.round}, named {point.top1:.2f}"


def draw_chart(points: list[Point], path: Path) -> None:
    """Plot held-out reward against minutes of training, one line per seed."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5))
    for side, color in ((TRL, "tab:orange"), (OURS, "tab:blue")):
        for number, seed in enumerate(sorted({point.seed for point in points if point.side == side})):
            line = curve(points, side, seed)
            minutes, rewards = [point.seconds / 60 for point in line], [point.reward for point in line]
            axis.plot(minutes, rewards, color=color, marker="o", markersize=3, label=None if number else side)
    axis.set_xlabel("minutes of training after the model is loaded")
    axis.set_ylabel("reward of held-out images: − kilobytes of JPEG")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
