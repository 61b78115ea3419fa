"""Count the guard's alarms in healthy runs of shipped recipes, and how near each statistic came to its limit.

Usage: python -m benchmarks.guard_alarms --output FOLDER [--only demo …]. Runs that are there are not trained again.
"""

import argparse
from pathlib import Path
from typing import Any

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.guard import SHARES
from ray_ddpo.train import run_training

RUNS = {
    "demo": {"rounds": 14, "evaluation": {"every": 2, "images": 90}},
    "demo_words": {"rounds": 12, "evaluation": {"every": 2, "images": 72}},
    "tiny/held_out": {"rounds": 8, "evaluation": {"every": 2}},
    "tiny/mixgrpo": {"rounds": 6, "evaluation": {"every": 1, "images": 45}},
}
OTHERS = ("dark_share", "saturation")  # limits on statistics of their own


def evaluations(name: str, folder: Path) -> list[dict[str, Any]]:
    """Train a shipped recipe unless that is done, and return the entries of its evaluations."""
    run = name.replace("/", "_")
    recipe = Recipe.load(name, **RUNS[name], name=run, output_dir=str(folder))
    there = (folder / run).exists()
    entries = EvalLog(Storage(folder / run)).entries() if there else []
    if not entries or entries[-1]["policy_version"] < recipe.rounds:
        run_training(recipe, serial=True, resume=there)
        entries = EvalLog(Storage(folder / run)).entries()
    return entries


def cell(entries: list[dict[str, Any]], limit: str) -> str:
    """Return the alarms of one limit among the evaluations after version 0, and the extreme of its statistic."""
    base, *later = entries
    about = [alarm["about"] for entry in later for alarm in entry["alarms"]]
    if limit == "scorers":
        known = {*SHARES, *OTHERS, "kl"}
        return f"{sum(name not in known for name in about)} of {len(later)}"
    count = f"{about.count(limit)} of {len(later)}"
    if limit == "saturation":
        values = [entry["saturation"] for entry in later if entry["saturation"] is not None]
        return f"{count}; {max(values):.2f}" if values else "no bound"
    before, after = (
        base["image_statistics"][limit],
        [entry["image_statistics"][limit] for entry in later],
    )
    if limit == "dark_share":
        return f"{count}; {max(after) - before:+.2f}"
    return f"{count}; {min(after) / before:.2f}"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table with a row a limit and a column a run."""
    lines = [["limit", *(f"`{name}`" for name in found)], ["---"] * (len(found) + 1)]
    for limit in (*SHARES, *OTHERS, "scorers"):
        lines.append([limit, *(cell(entries, limit) for entries in found.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    print(table({name: evaluations(name, options.output) for name in options.only}))


if __name__ == "__main__":
    main()
