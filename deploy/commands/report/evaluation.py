"""Section of the report on evaluations during training: curves over policy versions, alarms, and saved images."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.charts import Chart, RoundSeries, chart
from ray_ddpo.deploy.commands.report.image_pairs import data_uri
from ray_ddpo.deploy.commands.report.numbers import number
from ray_ddpo.deploy.evaluation.eval_log import REPORTED, EvalLog
from ray_ddpo.deploy.evaluation.eval_result import LogEntry

CATEGORY_PREFIX = "category/"  # of keys in an entry of evaluations.jsonl
BAND = "mean ± standard error of the difference from the pretrained model"
SHARES = ("edge_density", "sharpness", "entropy", "diversity")
ROWS = 8  # versions whose images are shown


@dataclass(frozen=True)
class VersionRow:
    """The saved images of one version as data URIs."""

    policy_version: int
    images: list[str]
    width: int
    alarm: bool  # whether the guard raised one


@dataclass(frozen=True)
class CategoryRow:
    """One score's mean in one category of prompts: under the first, the best and the last version."""

    score: str
    category: str
    first: float
    best: float
    best_version: int
    last: float


@dataclass(frozen=True)
class EvaluationSection:
    """The section's content. It is left out of the page if there are no charts."""

    charts: list[Chart]
    sentences: list[str]
    alarms: list[tuple[int, str, str]]  # version, subject, finding
    rows: list[VersionRow]
    categories: list[CategoryRow]


def evaluation_section(folder: RunFolder, recipe: Recipe) -> EvaluationSection:
    """Read `evaluations.jsonl`. If fewer than two versions were evaluated, the section is empty."""
    log, entries = EvalLog(folder.storage), evaluated_versions(folder)
    if len(entries) < 2:
        return EvaluationSection([], [], [], [], [])
    rows = [_row(log, each) for each in shown_versions(entries)]
    charts, sentences = evaluation_charts(entries, recipe), _sentences(folder, entries)
    return EvaluationSection(charts, sentences, alarm_rows(entries), rows, category_rows(entries, recipe))


def evaluated_versions(folder: RunFolder) -> list[LogEntry]:
    """Return the entries of `evaluations.jsonl`, sorted by policy version."""
    return sorted(EvalLog(folder.storage).entries(REPORTED), key=lambda each: each["policy_version"])


def category_rows(entries: list[LogEntry], recipe: Recipe) -> list[CategoryRow]:
    """Return a row for each score and category of prompts. Of equal means, the earliest version is the best."""
    rows, versions = [], [each["policy_version"] for each in entries]
    for score in shown_scores(entries, recipe):
        for key in (key for key in entries[0]["scores"][score] if key.startswith(CATEGORY_PREFIX)):
            means = np.array([_float(each["scores"][score].get(key)) for each in entries])
            if np.isfinite(means).any():
                best = int(np.nanargmax(means))
                values = (float(means[0]), float(means[best]), versions[best], float(means[-1]))
                rows.append(CategoryRow(score, key.removeprefix(CATEGORY_PREFIX), *values))
    return rows


def shown_scores(entries: list[LogEntry], recipe: Recipe) -> list[str]:
    """Return the scores' names, without the weighted sum if it is the only reward itself."""
    names, rewards = list(entries[0]["scores"]), recipe.all_rewards
    if len(rewards) == 1 and entries[0]["scores"]["reward"] == entries[0]["scores"][rewards[0].called]:
        names.remove("reward")  # the same twice
    return names


def alarm_rows(entries: list[LogEntry]) -> list[tuple[int, str, str]]:
    """Return version, subject and finding of each of the guard's alarms."""
    return [(each["policy_version"], alarm["about"], alarm["says"]) for each in entries for alarm in each["alarms"]]


def shown_versions(entries: list[LogEntry]) -> list[LogEntry]:
    """Choose at most ROWS versions: the first, the last, and versions at even distances between them."""
    if len(entries) <= ROWS:
        return entries
    return [entries[round(index)] for index in np.linspace(0, len(entries) - 1, ROWS)]


def _row(log: EvalLog, entry: LogEntry) -> VersionRow:
    images = log.images(entry["policy_version"])
    width = images[0].shape[1] if images else 0
    return VersionRow(entry["policy_version"], [data_uri(each) for each in images], width, bool(entry["alarms"]))


def evaluation_charts(entries: list[LogEntry], recipe: Recipe) -> list[Chart]:
    """Chart every score with its band, the shares left of image statistics, dark pixels, and the KL."""
    versions = np.array([each["policy_version"] for each in entries], np.float64)
    rewards = {table.called for table in recipe.all_rewards}
    wanted = [
        (name, BAND if name in rewards | {"reward"} else f"not trained on; {BAND}", _score(entries, name))
        for name in shown_scores(entries, recipe)
    ]
    shares = [RoundSeries(name, _share(entries, name)) for name in SHARES]
    wanted += [
        (
            "what is left",
            "share of the pretrained model's edges, sharpness, entropy and diversity within a prompt; 1: all",
            shares,
        ),
        (
            "dark share",
            "share of pixels that are nearly black",
            [RoundSeries("dark share", _image(entries, "dark_share"))],
        ),
        (
            "KL to the pretrained model",
            "nats a denoising step",
            [RoundSeries("KL", np.array([_float(each["kl_reference_nats"]) for each in entries]))],
        ),
    ]
    made = [chart(title, caption, versions, lines, "version") for title, caption, lines in wanted]
    return [found for found in made if found is not None]


def _score(entries: list[LogEntry], name: str) -> list[RoundSeries]:
    """Return one score over the versions: of the newest weights with a band, and of the moving average."""
    of_score = [each["scores"][name] for each in entries]
    means, errors, averages = (
        [_float(each.get(key)) for each in of_score] for key in ("mean", "standard_error", "average_mean")
    )
    return [
        RoundSeries("newest version", np.array(means), np.array(errors)),
        RoundSeries("moving average", np.array(averages)),
    ]


def _image(entries: list[LogEntry], name: str) -> Float[np.ndarray, "V"]:
    return np.array([_float(each["image_statistics"].get(name)) for each in entries])


def _share(entries: list[LogEntry], name: str) -> Float[np.ndarray, "V"]:
    values = _image(entries, name)
    return values / values[0] if values[0] else np.full(len(values), np.nan)


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _sentences(folder: RunFolder, entries: list[LogEntry]) -> list[str]:
    """Name the best version, and say if the guard found nothing."""
    best, sentences = folder.best_version(), []
    if best is not None:
        score = "held-out reward" if best["best_by"] == "reward" else f"held-out {best['best_by']}"
        sentences.append(
            f"Version {best['policy_version']} has the highest {score} without an alarm, {number(best['score'])}; "
            "its weights are kept under best/."
        )
    if not any(each["alarms"] for each in entries):
        sentences.append("The guard has found nothing.")
    return sentences


def guard_sentences(folder: RunFolder) -> list[str]:
    """Say for the summary that the guard ended the run, or which alarms the last version has."""
    ended = folder.guard_ended()
    if ended:
        weights = (
            "" if ended["weights_of"] is None else f" The run's weights are those of version {ended['weights_of']}."
        )
        return [
            f"The guard has ended the run at version {ended['policy_version']}: {'; '.join(ended['alarms'])}.{weights}"
        ]
    entries = EvalLog(folder.storage).entries(REPORTED)
    alarms = [alarm["says"] for alarm in entries[-1]["alarms"]] if entries else []
    return [f"At the last version the guard has found: {'; '.join(alarms)}."] if alarms else []
