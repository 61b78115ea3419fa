"""The page itself: what the template is given, and one text out."""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.reading import read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report import charts, numbers
from ray_ddpo.deploy.commands.report.evaluation import evaluation_told, guard_sentences
from ray_ddpo.deploy.commands.report.image_pairs import are_reduced, gallery, worst_and_best
from ray_ddpo.deploy.commands.report.prompts import held_out_table, training_table
from ray_ddpo.deploy.commands.report.scores import headline, scores
from ray_ddpo.deploy.commands.report.summary import summary_in_words, what_waits

HERE = Path(__file__).parent
VERSION_LINE = re.compile(r"# (\S+) (.+)")
Metrics = dict[str, float]


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left, as far as the page tells of it."""

    folder: RunFolder
    recipe: Recipe  # with the report's overrides
    overrides: list[str]
    rounds: list[Metrics]
    fingerprint: str  # of the weights
    policy_version: int


def report_page(run: FinishedRun, comparison: Comparison) -> str:
    """One HTML text that asks for nothing else: styles, script, drawings and images are in it; all that is told is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": numbers.number,
        "signed": numbers.signed,
        "percent": numbers.percent,
    }
    return environment.get_template("page.html.jinja").render(**_told(run, comparison))


def _told(run: FinishedRun, comparison: Comparison) -> dict[str, Any]:
    found = scores(comparison, run.recipe)
    recipe_text = read_text(run.folder.storage, run.folder.recipe)
    score = headline(run.recipe)
    worst, best = worst_and_best(comparison, score)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {
        "run": run,
        "recipe": run.recipe,
        "scores": found,
        "sentences": [*summary_in_words(found, run.rounds), *guard_sentences(run.folder), *_beginning(run.recipe)],
        "charts": charts.run_charts(run.rounds, [table.called for table in run.recipe.all_rewards]),
        "evaluation": evaluation_told(run.folder, run.recipe),
        "drawing": (charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM),
        "pairs": gallery(comparison, score),
        "images": len(comparison.before),
        "reduced": are_reduced(comparison.before),
        "worst": worst,
        "best": best,
        "held_out": held_out_table(comparison, score),
        "training": training_table(Ledger(run.folder.storage, run.recipe.rollouts), score),
        "strips": charts.strips(run.rounds),
        "what_waits": what_waits(run.rounds, run.recipe),
        "versions": versions(recipe_text),
        "recipe_text": recipe_text,
        # Our own files: they are not escaped, and hold nothing of the run.
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _beginning(recipe: Recipe) -> list[str]:
    """Say which earlier run's weights the run started from, if any."""
    start = recipe.start_from
    if start is None:
        return []
    return [
        f"The run started from the weights of {start.run} after round {start.round}, "
        f"fingerprint {(start.fingerprint or '')[:12]}, "
        "with a fresh optimizer; what is compared here is still the pretrained model."
    ]


def versions(recipe_text: str) -> list[tuple[str, str]]:
    """Package and version, from the lines in the head of a run's recipe."""
    found = []
    for line in recipe_text.splitlines():
        match = VERSION_LINE.fullmatch(line)
        if match is None:
            break
        found.append((match[1], match[2]))
    return found
