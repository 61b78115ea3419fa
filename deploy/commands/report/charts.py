"""Charts of a run round by round, as SVG paths and ticks for the page's template.

The SVG is our own: matplotlib's has fixed colors where the page follows the reader's dark mode, no labels under the
pointer, and 70 KB a chart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.deploy.commands.report.numbers import number, tick

Metrics = dict[str, float]
WIDTH, HEIGHT = 340, 190  # of the SVG; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 8, 24  # margins outside the axes; the left one is wider if ticks are long
LETTER, GAP = 6, 6  # widths of a tick's letter, and of the space between ticks and axis
POINTS = 200  # longer curves are averaged down to this many points
DOTS = 40  # curves of more points have no dots


@dataclass(frozen=True)
class RoundSeries:
    """Values round by round; NaN if a round has no value."""

    name: str
    values: Float[np.ndarray, "R"]
    deviation: Float[np.ndarray, "R"] | None = None  # half the height of the band


@dataclass(frozen=True)
class Curve:
    """One series as SVG paths."""

    name: str
    path: str
    band: str
    dots: list[tuple[str, str, str]]  # x, y, label


@dataclass(frozen=True)
class Chart:
    """Curves over the same rounds, with ticks in units of the SVG."""

    title: str
    caption: str
    curves: list[Curve]
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]
    in_words: str
    along: str = "round"  # unit of the horizontal axis
    left: int = LEFT  # margin that has room for the longest tick


@dataclass(frozen=True)
class Strip:
    """A role's busy share round by round, as a filled path in a box of 100 × 100."""

    role: str
    path: str
    busy: float  # mean share; NaN if unknown


def run_charts(rounds: list[Metrics], rewards: Sequence[str], kind: str = "image") -> list[Chart]:
    """Chart a run's metrics: rewards with a band, KL, clip fraction, seconds by part.

    Charts without values are left out. `kind` is what the model makes, "image" or "clip".
    """

    def series(metric: str, name: str, deviation: str | None = None) -> RoundSeries:
        return RoundSeries(name, column(rounds, metric), column(rounds, deviation) if deviation else None)

    band = f"mean of the training {kind}s ± their standard deviation"
    wanted = [("reward", band, [series("reward/mean", "reward", "reward/std")])]
    if len(rewards) > 1:
        wanted += [
            (f"reward {name}", band, [series(f"reward/{name}/mean", name, f"reward/{name}/std")]) for name in rewards
        ]
    wanted += [
        (
            "spread of rewards",
            f"standard deviation over all {kind}s of a round, and the mean of those within groups",
            [series("reward/std", f"all {kind}s"), series("reward/group_std", "within groups")],
        ),
        (
            "groups",
            f"share of groups whose {kind}s all have the same reward, and of {kind}s with the best reward",
            [series("reward/zero_std_groups", "without spread"), series("reward/saturation", "saturation")],
        ),
        (
            "KL",
            f"nats a denoising step; an unbiased estimate from the round's {kind}s, so noise may put it below 0",
            [series("kl_nats", "of the update"), series("kl_reference_nats", "to the pretrained model")],
        ),
        (
            "clip fraction",
            "share of transitions with a ratio outside 1 ± clip_range",
            [series("clip_fraction", "clip fraction")],
        ),
        (
            "seconds by part",
            "sampling and scoring are summed over a round's tasks",
            [series(f"seconds/{part}", part) for part in ("sample", "score", "learn", "round")],
        ),
        (
            "MFU",
            "counted operations as a share of what matrix products could do in the same seconds",
            [series("mfu/sampler", "samplers"), series("mfu/learner", "learner")],
        ),
    ]
    found = [chart(title, caption, column(rounds, "round"), lines) for title, caption, lines in wanted]
    return [made for made in found if made is not None]


def column(rounds: list[Metrics], metric: str) -> Float[np.ndarray, "R"]:
    """Return a metric round by round; NaN if a round has not logged it."""
    return np.array([metrics.get(metric, math.nan) for metrics in rounds], dtype=np.float64)


def chart(
    title: str, caption: str, rounds: Float[np.ndarray, "R"], lines: list[RoundSeries], along: str = "round"
) -> Chart | None:
    """Scale the series to common axes; return None if no series has a value."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    if len(rounds) > POINTS:
        caption += f"; each point is the mean of about {len(rounds) / POINTS:.3g} {along}s"
    at = binned(rounds)
    shown = [
        RoundSeries(line.name, binned(line.values), None if line.deviation is None else binned(line.deviation))
        for line in lines
    ]
    edges = np.concatenate([_edges(line) for line in shown])
    y_scale, y_ticks = _axis(edges, (HEIGHT - BOTTOM, TOP), integer=False)
    left = max([LEFT, *(LETTER * len(text) + GAP for _, text in y_ticks)])
    x_scale, x_ticks = _axis(at, (left, WIDTH - RIGHT), integer=True)
    return Chart(
        title,
        caption,
        [_curve(line, at, x_scale, y_scale) for line in shown],
        x_ticks,
        y_ticks,
        "; ".join(_in_words(line, along) for line in lines),
        along,
        left,
    )


def binned(values: Float[np.ndarray, "R"]) -> Float[np.ndarray, "P"]:
    """Average neighbors down to at most POINTS values; missing values are left out."""
    if len(values) <= POINTS:
        return values
    parts = [part[np.isfinite(part)] for part in np.array_split(values, POINTS)]
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def strips(rounds: list[Metrics]) -> list[Strip]:
    """Return the busy share of samplers, reward workers and learner in each round."""
    roles = {"samplers": "idle/sampler", "reward workers": "idle/reward_worker", "learner": "idle/learner"}
    return [_strip(role, 1 - column(rounds, metric)) for role, metric in roles.items()]


def _strip(role: str, busy: Float[np.ndarray, "R"]) -> Strip:
    """Turn a role's busy shares into bars."""
    shares = binned(busy)
    wide = 100 / len(shares)
    bars = [
        f"M{_short(wide * index)} 100v{_short(-100 * share)}h{_short(wide)}v{_short(100 * share)}z"
        for index, share in enumerate(shares)
        if np.isfinite(share)
    ]
    known = busy[np.isfinite(busy)]
    return Strip(role, "".join(bars), float(known.mean()) if len(known) else math.nan)


def _edges(line: RoundSeries) -> Float[np.ndarray, "E"]:
    if line.deviation is None:
        return line.values
    deviation = np.nan_to_num(line.deviation)
    return np.concatenate([line.values - deviation, line.values + deviation])


def _axis(values: Float[np.ndarray, "V"], ends: tuple[float, float], integer: bool) -> tuple[tuple, list]:
    """Return the scale from values to `ends` of the SVG as (offset, factor), and ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        margin = 0.5 if integer else abs(low) * 0.1
        low, high = low - margin, high + (margin or 1)
    located = MaxNLocator(4, steps=[1, 2, 5, 10], integer=integer).tick_values(low, high)
    if not integer:  # values get round numbers at the ends of the axis; rounds do not
        low, high = float(located[0]), float(located[-1])
    factor = (ends[1] - ends[0]) / (high - low)
    scale = (ends[0] - low * factor, factor)
    return scale, [(_short(_to(scale, value)), tick(value)) for value in located if low <= value <= high]


def _to(scale: tuple[float, float], value: float) -> float:
    return scale[0] + scale[1] * value


def _curve(line: RoundSeries, at: Float[np.ndarray, "P"], x_scale: tuple, y_scale: tuple) -> Curve:
    points = [(_short(_to(x_scale, x)), y) for x, y in zip(at, line.values, strict=True)]
    there = [(x, _short(_to(y_scale, y)), f"{line.name}: {number(y)}") for x, y in points if np.isfinite(y)]
    band = "" if line.deviation is None else _band(line, at, x_scale, y_scale)
    return Curve(line.name, _path(points, y_scale), band, there if len(there) <= DOTS else [])


def _path(points: list[tuple[str, float]], y_scale: tuple) -> str:
    """Return a line through the points, interrupted at missing values."""
    parts, pen_is_up = [], True
    for x, y in points:
        if not np.isfinite(y):
            pen_is_up = True
            continue
        parts.append(f"{'M' if pen_is_up else 'L'}{x} {_short(_to(y_scale, y))}")
        pen_is_up = False
    return "".join(parts)


def _band(line: RoundSeries, at: Float[np.ndarray, "P"], x_scale: tuple, y_scale: tuple) -> str:
    assert line.deviation is not None
    known = np.isfinite(line.values) & np.isfinite(line.deviation)
    x, middle, half = at[known], line.values[known], line.deviation[known]
    around = zip(np.concatenate([x, x[::-1]]), np.concatenate([middle + half, (middle - half)[::-1]]), strict=True)
    corners = [f"{_short(_to(x_scale, left))} {_short(_to(y_scale, value))}" for left, value in around]
    return f"M{'L'.join(corners)}z" if corners else ""


def _in_words(line: RoundSeries, along: str) -> str:
    known = line.values[np.isfinite(line.values)]
    return f"{line.name}: {number(known[0])} in the first {along}, {number(known[-1])} in the last"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
