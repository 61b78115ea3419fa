"""The figures of an evaluated version: what stands in `evaluations.jsonl`, and the metrics made of it. Pure functions."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import EvaluationSet
from ray_ddpo.common.metrics.statistics import paired_change
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import GuardTable
from ray_ddpo.common.run_storage.evaluation_log import EvaluatedImages
from ray_ddpo.deploy.evaluation.guard import Alarm, Judged, Look, alarms
from ray_ddpo.learner.checkpoints.learner_state import Evaluated

Figures = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What an evaluation saw of a version, and what the guard made of it."""

    policy_version: int
    look: Look
    alarms: tuple[Alarm, ...]

    @staticmethod
    def of(figures: Figures, scores: dict[str, np.ndarray]) -> "Verdict":
        """From the log."""
        images = {name: math.nan if value is None else value for name, value in figures["image_statistics"].items()}
        found = tuple(Alarm(alarm["about"], alarm["says"]) for alarm in figures["alarms"])
        return Verdict(figures["policy_version"], Look(scores, images, figures["kl_reference_nats"]), found)


def identity_of(recipe: Recipe, chosen: EvaluationSet) -> str:
    """Of what is sampled and who scores it: figures of different ones cannot be compared."""
    table = recipe.evaluation
    scorers = [scorer.model_dump(exclude={"workers"}) for scorer in table.scorers]
    sampled = [[prompt.text for prompt in chosen.prompts], list(chosen.seeds), table.batch_size, table.average_decay]
    if any(prompt.metadata for prompt in chosen.prompts):
        sampled.append([prompt.metadata for prompt in chosen.prompts])
    return hashlib.sha256(json.dumps([sampled, scorers], sort_keys=True).encode()).hexdigest()[:16]


def figures_of(
    recipe: Recipe,
    version: Evaluated,
    variants: dict[str, EvaluatedImages],
    images: dict[str, float],
    base: Verdict | None,
) -> tuple[Verdict, Figures]:
    """A version's verdict and its object in the log; `base` is the pretrained model's, None where this is it."""
    look = Look(variants["current"].scores, images, version.kl_reference_nats)
    scorers = [table.called for table in recipe.evaluation.scorers]
    found = tuple(alarms(base.look, look, scorers, recipe.guard)) if base else ()
    before = base.look.scores if base else look.scores
    of_scores = {name: _of_score(before[name], name, variants) for name in look.scores}
    figures = {
        "policy_version": version.policy_version,
        "images": len(variants["current"].seeds),
        "scores": of_scores,
        "image_statistics": images,
        "kl_reference_nats": version.kl_reference_nats,
        "alarms": [{"about": alarm.about, "says": alarm.says} for alarm in found],
    }
    return Verdict(version.policy_version, look, found), figures


def _of_score(before: np.ndarray, name: str, variants: dict[str, EvaluatedImages]) -> dict[str, float]:
    found = {"mean": _mean(variants["current"].scores[name])}
    if "average" in variants:
        found["average_mean"] = _mean(variants["average"].scores[name])
    change = paired_change(before, variants["current"].scores[name])
    if change is not None:
        found |= {"change": change.change, "standard_error": change.error}
    return found


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def as_judged(verdict: Verdict, settings: GuardTable) -> Judged:
    """What the guard needs to choose among versions."""
    return Judged(verdict.policy_version, _mean(verdict.look.scores[settings.best_by]), verdict.alarms)


def as_metrics(figures: Figures) -> dict[str, float]:
    """An object of the log under the metrics' names."""
    metrics = {"evaluation/policy_version": float(figures["policy_version"])}
    for name, values in figures["scores"].items():
        metrics |= {f"evaluation/{name}/{what}": value for what, value in values.items()}
    metrics |= {f"evaluation/images/{name}": value for name, value in figures["image_statistics"].items()}
    metrics["guard/alarms"] = float(len(figures["alarms"]))
    if figures["best_version"] is not None:
        metrics["guard/best_version"] = float(figures["best_version"])
    return metrics
