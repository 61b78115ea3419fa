"""Render report.html: the values that the template is given, and the summary in sentences."""

import base64
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_ddpo.common.metrics.diagnoses import bottleneck
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.reading import read_text
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report import charts
from ray_ddpo.deploy.commands.report.evaluation import evaluation_section, guard_sentences
from ray_ddpo.deploy.commands.report.image_pairs import are_reduced, gallery, worst_and_best
from ray_ddpo.deploy.commands.report.numbers import NARROW, duration, number, percent, signed, tick
from ray_ddpo.deploy.commands.report.scores import Score, headline, held_out_table, scores, training_table
from ray_ddpo.deploy.driver.cluster import has_cores_to_overlap
from ray_ddpo.deploy.driver.gpu_layout import roles_of
from ray_ddpo.deploy.evaluation.eval_result import WEIGHTED_SUM, EvalComparison

HERE = Path(__file__).parent
VERSION_LINE = re.compile(r"# (\S+) (.+)")
Metrics = dict[str, float]
CERTAIN, LIKELY = 3.0, 2.0  # standard errors


@dataclass(frozen=True)
class FinishedRun:
    """A run's recipe, logged rounds and weights, for the page."""

    folder: RunFolder
    recipe: Recipe  # with the overrides of `ddpo report`
    overrides: list[str]
    rounds: list[Metrics]
    fingerprint: str  # of the weights
    policy_version: int


def report_page(run: FinishedRun, comparison: EvalComparison) -> str:
    """Return one self-contained HTML text, with styles, script and images. Everything from the run is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent}
    return environment.get_template("page.html.jinja").render(**_context(run, comparison))


def _context(run: FinishedRun, comparison: EvalComparison) -> dict[str, Any]:
    """Return the values of the template's names."""
    found = scores(comparison, run.recipe)
    recipe_text = read_text(run.folder.storage, run.folder.recipe)
    score, kind = headline(run.recipe), "image" if comparison.frame_rate is None else "clip"
    worst, best = worst_and_best(comparison, score)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {
        "run": run,
        "recipe": run.recipe,
        "scores": found,
        "sentences": [*summary_in_words(found, run.rounds, kind), *guard_sentences(run.folder), *_start(run.recipe)],
        "charts": charts.run_charts(run.rounds, [table.called for table in run.recipe.all_rewards], kind),
        "evaluation": evaluation_section(run.folder, run.recipe),
        "chart_size": (charts.WIDTH, charts.HEIGHT, charts.RIGHT),
        "pairs": gallery(comparison, score),
        "images": len(comparison.before),
        "reduced": are_reduced(comparison.before),
        "clips": kind == "clip",
        "kind": kind,
        "worst": worst,
        "best": best,
        "held_out": held_out_table(comparison, score),
        "training": training_table(Ledger(run.folder.storage, run.recipe.rollouts), score),
        "strips": charts.strips(run.rounds),
        "what_waits": what_waits(run.rounds, run.recipe),
        "versions": versions(recipe_text),
        "recipe_text": recipe_text,
        # Not escaped: these are our own files, and hold nothing of the run.
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _start(recipe: Recipe) -> list[str]:
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
    """Read package names and versions from the comment at the head of a run's recipe."""
    found = []
    for line in recipe_text.splitlines():
        match = VERSION_LINE.fullmatch(line)
        if match is None:
            break
        found.append((match[1], match[2]))
    return found


def summary_in_words(found: list[Score], rounds: list[Metrics], kind: str = "image") -> list[str]:
    """Return the summary's sentences, the most important first. `kind` is what was scored, "image" or "clip"."""
    reward = found[0]
    sentences = [_verdict(reward, kind), _images(reward, kind)]
    sentences += [_score_sentence(score, kind) for score in found[1:]]
    sentences += [_floor(score, kind) for score in found if score.floor is not None]
    sentences += _suspicion(reward, [score for score in found if not score.trained_on], kind)
    return [*sentences, _training(rounds, kind), *_dropped(rounds, kind)]


def what_waits(rounds: list[Metrics], recipe: Recipe) -> str:
    """Return one sentence that names the bottleneck."""
    return bottleneck(rounds, roles_of(recipe), has_cores_to_overlap(recipe))


def _verdict(reward: Score, kind: str) -> str:
    """Say how the headline reward changed."""
    name = "" if reward.name == WEIGHTED_SUM else f" {reward.name}"
    return (
        f"On {reward.images} held-out {kind}s, sampled with the same prompts and the same noise, the reward{name} "
        f"{_moved(reward)}: {_certainty(reward, kind)}."
    )


def _moved(score: Score) -> str:
    if not score.change:
        return f"stayed at {number(score.before)}"
    verb = "rose" if score.change > 0 else "fell"
    how_much = f" ({signed(score.percent)}{NARROW}%)" if score.percent is not None else ""
    return f"{verb} from {number(score.before)} to {number(score.after)}{how_much}"


def _certainty(score: Score, kind: str) -> str:
    """Say whether a change may be chance."""
    if math.isnan(score.error):
        return "without a standard error, because a category of the suite has one image"
    if score.errors is None:
        return f"every {kind} changed alike" if score.change else f"no {kind} changed"
    size = f"{signed(score.errors)} paired standard errors"
    if abs(score.errors) >= CERTAIN:
        return f"{size}, more than chance"
    if abs(score.errors) >= LIKELY:
        return f"{size}, probably more than chance"
    return f"{size}, which cannot be told from chance"


def _images(reward: Score, kind: str) -> str:
    same = reward.images - reward.higher - reward.lower
    equal = f", {same} the same" if same else ""
    return f"{reward.higher} {kind}s have a higher reward than before, {reward.lower} a lower one{equal}."


def _score_sentence(score: Score, kind: str) -> str:
    part = "" if score.trained_on else ", which was not trained on,"
    kept = f" Of the {kind}s with 1 before, {percent(score.kept)} still have it." if score.kept is not None else ""
    return f"{score.name}{part} {_moved(score)}: {_certainty(score, kind)}.{kept}"


def _floor(score: Score, kind: str) -> str:
    return (
        f"{percent(score.below_after)} of the {kind}s are below the floor {tick(score.floor)} of {score.name}; "
        f"{percent(score.below_before)} were before."
    )


def _suspicion(reward: Score, scorers: list[Score], kind: str) -> list[str]:
    """Point out possible reward hacking: the reward rose while a scorer that is not trained on fell."""
    fell = [score.name for score in scorers if score.errors is not None and score.errors <= -LIKELY]
    if not fell or (reward.errors or 0) < LIKELY:
        return []
    return [f"The reward rose while {' and '.join(fell)} fell: this may be reward hacking, so look at the {kind}s."]


def _training(rounds: list[Metrics], kind: str) -> str:
    images, seconds, reward = (charts.column(rounds, name) for name in ("images", "seconds/round", "reward/mean"))
    count = "one round" if len(rounds) == 1 else f"{len(rounds)} rounds"
    done = f"The run sampled {images.sum():,.0f} {kind}s in {count} and {duration(seconds.sum())}"
    known = reward[[math.isfinite(value) for value in reward]]
    if len(known) < 2:
        return f"{done}."
    return f"{done}; their mean reward was {number(known[0])} in the first round and {number(known[-1])} in the last."


def _dropped(rounds: list[Metrics], kind: str) -> list[str]:
    count = charts.column(rounds, "images_dropped").sum()
    if not count:
        return []
    return [
        f"{count:.0f} of these {kind}s could not be scored, or one of their group; the learner did not train on them."
    ]
