"""Plot and tabulate the lag study: reward against images sampled, and against the wall-clock time of a round."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Results = list[dict[str, Any]]
MORE_WORK = ("proximal", "weight", "mask")  # corrections that need extra passes
WINDOW = 64  # images per point of a curve, for any size of round
PANELS = (
    ("large rounds as they are: 64 images, 4 optimizer steps", ("large-*-plain", "large-lag0-parts")),
    ("smaller rounds as they are: 32 images, 2 steps; 16 images, 1 step", ("middle-*-plain", "small-*-plain")),
    ("large rounds at lag 1, with and without corrections", ("large-lag0-plain", "large-lag1-*")),
    ("large rounds at lag 2 and 4, with and without corrections", ("large-lag0-plain", "large-lag2-*", "large-lag4-*")),
)


def round_seconds(sample: float, score: float, update: float, lag: int, shape: tuple[int, int, int]) -> float:
    """Return the wall-clock time of a round with N samplers and one reward worker on separate cores, without overhead.

    `shape` is (N, tasks per round, parts per round). A task is scored while the next ones are sampled.
    """
    samplers, tasks, parts = shape
    if lag == 0 and parts > 1:
        done = 0.0
        for last in range(tasks // parts, tasks + 1, tasks // parts):
            waves = -(-last // samplers)  # tasks are indivisible, so samplers work in waves
            done = max(done, (waves * sample + score) / tasks) + update / parts
        return done
    in_step = sample / samplers + score / tasks + update
    return in_step if lag == 0 else max(sample / samplers, score, update, in_step / (lag + 1))


def paces(results: Results, costs: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Return, by correction, the median seconds of sampling, scoring and learning per image on one thread.

    The work per image is the same in every run, except for the passes that a correction adds to learning. All runs
    therefore share the medians, so that other load on the machine favours none. `costs` holds the cost of added passes,
    measured in one process.
    """
    sample, score = (_median(results, part) for part in ("sample", "score"))
    learn = _median([each for each in results if each["correction"] not in MORE_WORK] or results, "learn")
    return {each["correction"]: (sample, score, learn * costs.get(each["correction"], 1.0)) for each in results}


def _median(results: Results, part: str) -> float:
    return float(np.median(np.concatenate([_seconds_per_image(result, part) for result in results])))


def _seconds_per_image(result: dict[str, Any], part: str) -> np.ndarray:
    return np.array([metrics[f"seconds/{part}"] for metrics in result["rounds"]]) / result["round_images"]


def seconds_an_image(result: dict[str, Any], pace: tuple[float, float, float], samplers: int) -> float:
    """Return the seconds per image of this run's schedule, given `pace` seconds of sampling, scoring and learning."""
    sample, score, learn = (seconds * result["round_images"] for seconds in pace)
    shape = (samplers, result["tasks"], result.get("parts", 1))
    return round_seconds(sample, score, learn, result["lag"], shape) / result["round_images"]


def curve(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of images sampled and the mean reward of the last `WINDOW` of them."""
    size = result["round_images"]
    rewards = np.array([metrics["reward/mean"] for metrics in result["rounds"]])
    width = max(1, WINDOW // size)
    means = np.convolve(rewards, np.full(width, 1 / width), mode="valid")
    return size * np.arange(width, len(rewards) + 1), means


def by_setting(results: Results) -> dict[str, Results]:
    """Group runs that differ only in their seed, in the order of the results."""
    groups: dict[str, Results] = defaultdict(list)
    for result in results:
        groups[result["setting"]].append(result)
    return groups


def draw_chart(results: Results, path: Path, samplers: int, costs: dict[str, float]) -> None:
    """Plot one row per question: reward against images (left) and against seconds (right)."""
    from fnmatch import fnmatch

    from matplotlib import pyplot as plt

    groups, pace = by_setting(results), paces(results, costs)
    figure, rows = plt.subplots(len(PANELS), 2, figsize=(14, 4.4 * len(PANELS)), squeeze=False)
    for (title, patterns), (left, right) in zip(PANELS, rows, strict=True):
        shown = [name for name in groups if any(fnmatch(name, pattern) for pattern in patterns)]
        for name in sorted(shown):
            color = plt.get_cmap("tab10")(sorted(shown).index(name) % 10)
            draw_setting(left, name, groups[name], 1.0, color)
            first = groups[name][0]
            seconds = seconds_an_image(first, pace[first["correction"]], samplers)
            draw_setting(right, name, groups[name], seconds, color)
        left.set_title(title, fontsize=10)
        left.set_xlabel("images sampled")
        right.set_xlabel(
            f"seconds, by the schedule's formula from an image's median times on one thread\n"
            f"({samplers} sampler{'s' * (samplers > 1)}, reward worker and learner stand in on cores of their own)"
        )
        for axis in (left, right):
            axis.set_ylabel(f"reward, mean of the last {WINDOW} images")
            axis.grid(alpha=0.3)
            if shown:
                axis.legend(fontsize=8, loc="upper left")
    figure.suptitle("band: from the lowest to the highest of the seeds; line: their mean", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_setting(axis: Any, name: str, runs: Results, scale: float, color: Any) -> None:
    """Plot one line with its band. The horizontal axis is images times `scale`."""
    curves = [curve(run) for run in runs]
    length = min(len(means) for _, means in curves)
    images, means = curves[0][0][:length] * scale, np.stack([values[:length] for _, values in curves])
    label = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})"
    axis.plot(images, means.mean(0), color=color, label=label, marker="o" if length == 1 else None)
    axis.fill_between(images, means.min(0), means.max(0), color=color, alpha=0.15)


def table(results: Results, samplers: int, costs: dict[str, float]) -> str:
    """Return a Markdown table with one line per setting.

    The columns hold, by seed, the change on held-out images and the share of animals that are still named, and seconds
    per image.
    """
    lines = [
        "| setting | change of the reward on held-out images | mean | still named | clipped | masked | seconds an image |",
        "|---|---|---|---|---|---|---|",
    ]
    pace = paces(results, costs)
    for name, runs in by_setting(results).items():
        changes = [
            (run["held_out"]["reward_after"] - run["held_out"]["reward_before"]) / abs(run["held_out"]["reward_before"])
            for run in runs
        ]
        each = ", ".join(f"{100 * change:+.1f}" for change in changes)
        seconds = seconds_an_image(runs[0], pace[runs[0]["correction"]], samplers)
        named = ", ".join(f"{run['held_out']['scorers']['animal_classifier']['kept']:.2f}" for run in runs)
        clipped, masked = share(runs, "clip_fraction"), share(runs, "masked_fraction")
        lines.append(
            f"| {name} | {each} % | {100 * np.mean(changes):+.1f} % | {named} | {clipped} | {masked} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def share(runs: Results, key: str) -> str:
    """Return the mean of a share over all rounds of the runs that have it."""
    values = [metrics[key] for run in runs for metrics in run["rounds"] if key in metrics]
    return f"{100 * np.mean(values):.0f} %" if values else "–"
