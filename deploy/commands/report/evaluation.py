"""What the evaluations along the way have found: curves over the versions, the guard's findings, and how the run ended."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.evaluation_log import REPORTED, EvaluationLog
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.charts import Chart, Series, chart
from ray_ddpo.deploy.commands.report.image_pairs import data_uri
from ray_ddpo.deploy.commands.report.numbers import number

Figures = dict[str, Any]
BAND = "mean ± standard error of the difference from the pretrained model"
SHARES = ("sharpness", "entropy", "diversity")
ROWS = 8  # versions whose images are shown: the first, the last, and between them at even distances


@dataclass(frozen=True)
class VersionRow:
    """The images of one version that were kept, as data URIs, and whether the guard has found something."""

    policy_version: int
    images: list[str]
    width: int
    alarm: bool


@dataclass(frozen=True)
class EvaluationTold:
    """For the page; without charts there is nothing to tell."""

    charts: list[Chart]
    sentences: list[str]
    alarms: list[tuple[int, str, str]]  # version, what it is about, what it says
    rows: list[VersionRow]


def evaluation_told(folder: RunFolder, recipe: Recipe) -> EvaluationTold:
    """From the run's `evaluations.jsonl`; of one version alone there is no curve."""
    log, figures = EvaluationLog(folder.storage), evaluated(folder)
    if len(figures) < 2:
        return EvaluationTold([], [], [], [])
    rows = [_row(log, each) for each in shown_versions(figures)]
    return EvaluationTold(evaluation_charts(figures, recipe), _sentences(folder, figures), alarms_told(figures), rows)


def evaluated(folder: RunFolder) -> list[Figures]:
    """What was found of each version, by number."""
    return sorted(EvaluationLog(folder.storage).figures(REPORTED), key=lambda each: each["policy_version"])


def alarms_told(figures: list[Figures]) -> list[tuple[int, str, str]]:
    """Version, what it is about and what it says, of everything that the guard has found."""
    return [(each["policy_version"], alarm["about"], alarm["says"]) for each in figures for alarm in each["alarms"]]


def shown_versions(figures: list[Figures]) -> list[Figures]:
    """At most ROWS of the versions, by number: the first, the last, and between them at even distances."""
    if len(figures) <= ROWS:
        return figures
    return [figures[round(place)] for place in np.linspace(0, len(figures) - 1, ROWS)]


def _row(log: EvaluationLog, figures: Figures) -> VersionRow:
    images = log.images(figures["policy_version"])
    width = images[0].shape[1] if images else 0
    return VersionRow(figures["policy_version"], [data_uri(each) for each in images], width, bool(figures["alarms"]))


def evaluation_charts(figures: list[Figures], recipe: Recipe) -> list[Chart]:
    """Every score with its band, what is left of the images, and how far the policy has gone."""
    versions = np.array([each["policy_version"] for each in figures], np.float64)
    rewards = {table.called for table in recipe.all_rewards}
    names = list(figures[0]["scores"])
    if len(rewards) == 1 and figures[0]["scores"]["reward"] == figures[0]["scores"][next(iter(rewards))]:
        names.remove("reward")  # the same curve twice
    wanted = [
        (name, BAND if name in rewards | {"reward"} else f"not trained on; {BAND}", _score(figures, name))
        for name in names
    ]
    shares = [Series(name, _share(figures, name)) for name in SHARES]
    wanted += [
        ("what is left", "of the pretrained model's sharpness, entropy and diversity within a prompt; 1: all", shares),
        ("dark share", "of pixels that are nearly black", [Series("dark share", _image(figures, "dark_share"))]),
        ("KL to the pretrained model", "nats a denoising step", [Series("KL", _numbers(figures, "kl_reference_nats"))]),
    ]
    made = [chart(title, caption, versions, lines, "version") for title, caption, lines in wanted]
    return [sampled for sampled in made if sampled is not None]


def _score(figures: list[Figures], name: str) -> list[Series]:
    of_score = [each["scores"][name] for each in figures]
    means, errors, averages = (
        [_float(each.get(key)) for each in of_score] for key in ("mean", "standard_error", "average_mean")
    )
    return [Series("newest version", np.array(means), np.array(errors)), Series("moving average", np.array(averages))]


def _image(figures: list[Figures], name: str) -> Float[np.ndarray, "V"]:
    return np.array([_float(each["image_statistics"][name]) for each in figures])


def _share(figures: list[Figures], name: str) -> Float[np.ndarray, "V"]:
    values = _image(figures, name)
    return values / values[0] if values[0] else np.full(len(values), np.nan)


def _numbers(figures: list[Figures], name: str) -> Float[np.ndarray, "V"]:
    return np.array([_float(each[name]) for each in figures])


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _sentences(folder: RunFolder, figures: list[Figures]) -> list[str]:
    best, sentences = folder.best_version(), []
    if best is not None:
        what = "held-out reward" if best["best_by"] == "reward" else f"held-out {best['best_by']}"
        sentences.append(
            f"Version {best['policy_version']} has the highest {what} without an alarm, {number(best['score'])}; its weights are "
            "kept under best/."
        )
    if not any(each["alarms"] for each in figures):
        sentences.append("The guard has found nothing.")
    return sentences


def guard_sentences(folder: RunFolder) -> list[str]:
    """For the summary: that the guard has ended the run, or what it has found at the last version."""
    ended = folder.guard_ended()
    if ended:
        weights = (
            "" if ended["weights_of"] is None else f" The run's weights are those of version {ended['weights_of']}."
        )
        return [
            f"The guard has ended the run at version {ended['policy_version']}: {'; '.join(ended['alarms'])}.{weights}"
        ]
    figures = EvaluationLog(folder.storage).figures(REPORTED)
    alarms = [alarm["says"] for alarm in figures[-1]["alarms"]] if figures else []
    return [f"At the last version the guard has found: {'; '.join(alarms)}."] if alarms else []
