"""Count the guard's alarms in runs that are known to be healthy, and how near each statistic came to its limit.

Usage: python -m benchmarks.guard_alarms RUN … The evaluations of a run are counted. If it has none, the first images of
its report are compared, and the saturation is that of its rounds.
"""

import argparse
import base64
import html
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.image_summary import image_summary
from ray_ddpo.common.run_storage.png import from_png
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.guard import SHARES, VersionStats, alarms

LIMITS = (*SHARES, "dark_share", "saturation")
IMAGE = re.compile(r'<img class="(before|after)" src="data:image/png;base64,([^"]+)" alt="\w+: ([^"]*)"')

Entry = dict[str, Any]  # of evaluations.jsonl


def evaluations(location: str) -> list[Entry]:
    """Return the entries of a run's evaluations, or one of the pretrained model and one of the run's weights."""
    folder = RunFolder(location)
    if entries := EvalLog(folder.storage).entries():
        return entries
    gallery = folder.report.read("report.html").decode().partition('id="gallery"')[2].partition("</section>")[0]
    rounds = [each.get("reward/saturation") for each in read_json_lines(folder.storage, folder.metrics)]
    known = [share for share in rounds if share is not None]
    saturation = {"before": known[0], "after": max(known)} if known else {"before": None, "after": None}
    stats = {side: VersionStats({}, statistics(gallery, side), saturation=saturation[side]) for side in saturation}
    raised = list(alarms(stats["before"], stats["after"], [], folder.load_recipe([]).guard))
    return [
        {"image_statistics": each.images, "saturation": each.saturation, "alarms": [asdict(alarm) for alarm in found]}
        for each, found in ((stats["before"], []), (stats["after"], raised))
    ]


def statistics(gallery: str, side: str) -> dict[str, float]:
    """Return the image statistics of one side of the gallery of a report, in HTML."""
    shown = [(data, html.unescape(prompt)) for of, data, prompt in IMAGE.findall(gallery) if of == side]
    return image_summary(np.stack([from_png(base64.b64decode(data)) for data, _ in shown]), [text for _, text in shown])


def cell(entries: list[Entry], limit: str) -> str:
    """Return the alarms of one limit after the first entry, and the extreme of its statistic."""
    base, *later = entries
    about = [alarm["about"] for entry in later for alarm in entry["alarms"]]
    count = f"{about.count(limit)} of {len(later)}"
    if limit == "scorers":
        return "–" if "scores" not in base else f"{sum(name not in (*LIMITS, 'kl') for name in about)} of {len(later)}"
    if limit == "saturation":
        values = [entry["saturation"] for entry in later if entry["saturation"] is not None]
        return f"{count}; {max(values):.2f}" if values else "no bound"
    before, after = base["image_statistics"][limit], [entry["image_statistics"][limit] for entry in later]
    if limit == "dark_share":
        return f"{count}; {max(after) - before:+.2f}"
    return "–" if math.isnan(before) else f"{count}; {min(after) / before:.2f}"


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
    options = parser.parse_args()
    print(table({Path(run).name: evaluations(run) for run in options.runs}))


if __name__ == "__main__":
    main()
