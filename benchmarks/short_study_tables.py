"""Tables of the short study."""

from typing import Any

import numpy as np

from benchmarks.lag_study_chart import by_setting

Results = list[dict[str, Any]]


def cost(runs: Results) -> float:
    """Return the seconds of process time per image, the median of the runs."""
    return float(np.median([run["process_seconds_per_image"] for run in runs]))


def change(run: dict[str, Any]) -> float:
    """Return the relative change of the reward on held-out images."""
    found = run["held_out"]
    return (found["reward_after"] - found["reward_before"]) / abs(found["reward_before"])


def errors(run: dict[str, Any]) -> float:
    """Return the change in paired standard errors."""
    found = run["held_out"]
    return (found["reward_after"] - found["reward_before"]) / found["paired_standard_error"]


def held_out_table(results: Results) -> str:
    """Return a Markdown table: change on held-out images by seed, animals that are still named, and costs."""
    lines = [
        "| recipe | change of the held-out reward, by seed | mean | fewest paired standard errors | still named, by seed "
        "| CPU seconds an image |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_setting(results).items():
        each = ", ".join(f"{100 * change(run):+.1f}" for run in runs)
        kept = ", ".join(f"{run['held_out']['kept']:.2f}" for run in runs)
        mean = 100 * np.mean([change(run) for run in runs])
        fewest = min(errors(run) for run in runs)
        lines.append(f"| `{name}` | {each} % | {mean:+.1f} % | {fewest:.1f} | {kept} | {cost(runs):.3f} |")
    return "\n".join(lines)


def gradient_table(results: Results) -> str:
    """Return a Markdown table of the differentiable rewards: rewards, costs, and what became of the images."""
    lines = [
        "| reward and algorithm | held-out reward, by seed | paired standard errors | named, before → after "
        "| dark / sharpness / entropy | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_setting(results).items():
        found = [run["held_out"] for run in runs]
        rewards = ", ".join(f"{each['reward_before']:.3g} → {each['reward_after']:.3g}" for each in found)
        fewest = ", ".join(f"{errors(run):.1f}" for run in runs)
        named = ", ".join(f"{each['named_before']:.2f} → {each['named_after']:.2f}" for each in found)
        seconds = cost(runs) * runs[0]["images"]
        lines.append(f"| {name} | {rewards} | {fewest} | {named} | {_statistics(found)} | {seconds:.0f} |")
    return "\n".join(lines)


def _statistics(found: list[dict[str, Any]]) -> str:
    """Return the means over the seeds before and after: dark share, sharpness, entropy."""
    shares = []
    for name, digits in (("dark_share", 2), ("sharpness", 0), ("entropy", 2)):
        before, after = (np.mean([each[f"statistics_{when}"][name] for each in found]) for when in ("before", "after"))
        shares.append(f"{before:.{digits}f} → {after:.{digits}f}")
    return " / ".join(shares)
