"""Count the guard's alarms in runs that are known to be healthy, and how near each statistic came to its limit.

Usage: python -m benchmarks.guard_alarms RUN … [--images 72]. The evaluations of a run are counted. If it has none, its
weights are evaluated, and compared with the pretrained model.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.common.metrics.group_statistics import saturation
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.report import compare
from ray_ddpo.deploy.driver.components import SCORING, build_components
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import WEIGHTED_SUM
from ray_ddpo.deploy.evaluation.guard import SHARES, VersionStats, alarms

LIMITS = (*SHARES, "dark_share", "saturation")
IMAGES = 72

Entry = dict[str, Any]  # of evaluations.jsonl


def evaluations(location: str, images: int) -> list[Entry]:
    """Return the entries of a run's evaluations, or of its weights and the pretrained model."""
    folder = RunFolder(location)
    if entries := EvalLog(folder.storage).entries():
        return entries
    recipe = folder.load_recipe(["--evaluation.images", str(images)])
    components = build_components(recipe, used=SCORING)
    found, possible = compare(components, location, lambda base: None), components.reward_range
    keys = [prompt.key for prompt in found.chosen.prompts]
    before, after = (
        VersionStats(
            scores,
            image_summary(pixels, keys),
            saturation=saturation(scores[WEIGHTED_SUM], possible) if possible else None,
        )
        for scores, pixels in ((found.scores_before, found.before), (found.scores_after, found.after))
    )
    raised = [
        asdict(alarm) for alarm in alarms(before, after, [table.called for table in recipe.scorers], recipe.guard)
    ]
    return [
        {"image_statistics": stats.images, "saturation": stats.saturation, "alarms": raised if stats is after else []}
        for stats in (before, after)
    ]


def cell(entries: list[Entry], limit: str) -> str:
    """Return the alarms of one limit after the first entry, and the extreme of its statistic."""
    base, *later = entries
    about = [alarm["about"] for entry in later for alarm in entry["alarms"]]
    count = f"{about.count(limit)} of {len(later)}"
    if limit == "scorers":
        return f"{sum(name not in (*LIMITS, 'kl') for name in about)} of {len(later)}"
    if limit == "saturation":
        values = [entry["saturation"] for entry in later if entry["saturation"] is not None]
        return f"{count}; {max(values):.2f}" if values else "no bound"
    before, after = base["image_statistics"][limit], [entry["image_statistics"][limit] for entry in later]
    return f"{count}; " + (f"{max(after) - before:+.2f}" if limit == "dark_share" else f"{min(after) / before:.2f}")


def table(found: dict[str, list[Entry]]) -> str:
    """Return a Markdown table with a row a run and a column a limit."""
    lines = [["run", *LIMITS, "scorers"], ["---"] * (len(LIMITS) + 2)]
    for name, entries in found.items():
        lines.append([f"`{name}`", *(cell(entries, limit) for limit in (*LIMITS, "scorers"))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Print the table of the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--images", type=int, default=IMAGES, help="images of a run without evaluations")
    options = parser.parse_args()
    print(table({Path(run).name: evaluations(run, options.images) for run in options.runs}))


if __name__ == "__main__":
    main()
