"""EvalResult: held-out images with their scores; how they are made, compared, logged and turned into metrics."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_ddpo.actors.evaluation.eval_set import EvalSet, build_eval_set, sample_eval_images
from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.clips import Pixels, are_clips
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.prompt_lengths import print_cut_prompts
from ray_ddpo.common.input_images import without_places
from ray_ddpo.common.metrics.group_statistics import RewardRange, saturation
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.suites import Suite
from ray_ddpo.common.trajectory import ImageBatch
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.evaluation.categories import TOTAL, change_of_means, mean_score, means_by_category, suite_means
from ray_ddpo.deploy.evaluation.guard import Alarm, JudgedVersion, VersionStats, alarms
from ray_ddpo.learner.checkpoints.learner_state import EvalVersion

LogEntry = dict[str, Any]  # of one policy version, in evaluations.jsonl
PROGRESS_SECONDS = 5.0
WEIGHTED_SUM = "reward"  # the name of the rewards' weighted sum among the scores


@dataclass(frozen=True)
class EvalResult:
    """The held-out images of one policy version, or of the moving average at this version, with their scores."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    scores: dict[str, np.ndarray]  # by reward and scorer, [N]; NaN if an image has no score
    pixels: Pixels
    without_image: frozenset[int] = frozenset()  # rows that could not be sampled; their pixels are black
    usage: dict[str, float] = field(default_factory=dict)  # what scoring cost, by reward and count
    frame_rate: float | None = None  # of clips, in frames a second


@dataclass(frozen=True)
class EvalComparison:
    """The same held-out images under the pretrained weights and under a run's weights."""

    chosen: EvalSet
    before: Pixels
    after: Pixels
    scores_before: dict[str, np.ndarray]  # by reward and scorer, [N]; WEIGHTED_SUM is among them
    scores_after: dict[str, np.ndarray]
    frame_rate: float | None = None  # of clips, in frames a second


class EvalScorer:
    """Samples and scores the recipe's evaluation set in this process, under any weights.

    Prompts and noise stay the same, so two results can be compared image by image.
    """

    def __init__(self, components: Components) -> None:
        recipe = components.recipe
        self.chosen = build_eval_set(recipe.evaluation, components.prompts)
        self._sampling = recipe.held_out_sampling
        rewards, frames = components.rewards | components.scorers, components.frame_scoring
        self._worker = RewardWorker(rewards, recipe.reward_workers, recipe.runtime, frames=frames)
        self._weights = components.aggregation.weights
        self._checked_lengths = False

    def loaded_parts(self) -> Base:
        """Return the fingerprints of the files that rewards and scorers have loaded."""
        return self._worker.loaded_parts()

    def evaluate(self, policy: Policy, label: str) -> EvalResult:
        """Sample the images under the policy's current weights, and score them.

        Progress is printed to standard error, at most one line in PROGRESS_SECONDS; `label` names the weights there.
        The first call prints a line if text encoders truncate prompts.
        """
        count, printed = len(self.chosen.seeds), time.monotonic()
        print_line(f"{label}: samples {count} images")

        def progress(images: int) -> None:
            nonlocal printed
            if images == count or time.monotonic() - printed > PROGRESS_SECONDS:
                printed = time.monotonic()
                print_line(f"{label}: {images} of {count} images sampled{', scores them' if images == count else ''}")

        if not self._checked_lengths:
            texts = [prompt.text for prompt in self.chosen.prompts]
            print_cut_prompts(policy.text_readers(), texts, self._sampling, policy.guided_above)
        self._checked_lengths = True
        pixels = sample_eval_images(policy, self.chosen, self._sampling, progress)
        scores = self._worker.score(ImageBatch(pixels, self.chosen.prompts)).rewards
        of_all, frame_rate = with_weighted_sum(scores, self._weights), policy.frame_rate if are_clips(pixels) else None
        return EvalResult(self.chosen.prompts, self.chosen.seeds, of_all, pixels, frame_rate=frame_rate)


def with_weighted_sum(scores: dict[str, np.ndarray], weights: dict[str, float]) -> dict[str, np.ndarray]:
    """Add the weighted sum of the rewards to the scores, under WEIGHTED_SUM."""
    return {**scores, WEIGHTED_SUM: np.sum([weight * scores[name] for name, weight in weights.items()], axis=0)}


def scorer_tables(recipe: Recipe) -> dict[str, RewardTable]:
    """Return the tables of all rewards and scorers by name: first the rewards, which are trained on."""
    return {table.called: table for table in (*recipe.all_rewards, *recipe.scorers)}


def suite_told(
    chosen: EvalSet, scores: dict[str, dict[str, np.ndarray]], names: Sequence[str]
) -> dict[str, str | dict[str, Any]]:
    """Return the means of a suite for JSON, with their intervals: by score, by weights, and by category.

    Args:
        chosen: the evaluation set, which follows a suite.
        scores: by weights, and by reward and scorer.
        names: the rewards and scorers.
    """
    assert chosen.suite is not None, "no suite is followed"
    told: dict[str, Any] = {}
    for name in names:
        told[name] = {}
        for weights, of_weights in scores.items():
            total, of_category = suite_means(chosen.suite, chosen.prompts, of_weights[name])
            told[name][weights] = {key: mean.as_json() for key, mean in {TOTAL: total, **of_category}.items()}
    return {"name": chosen.suite.name, "images": chosen.in_words, "scores": told}


def eval_identity(recipe: Recipe, chosen: EvalSet) -> str:
    """Hash prompts, seeds, batches and scorers; results with different hashes cannot be compared."""
    table = recipe.evaluation
    scorers = [_without_frames(scorer.model_dump(exclude={"workers"})) for scorer in recipe.scorers]
    sampled = [[prompt.text for prompt in chosen.prompts], list(chosen.seeds), table.batch_size, table.ema_decay]
    if table.own_sampling:
        sampled.append(table.own_sampling)
    if table.followed:
        sampled.append({"suite": table.suite})
    if any(prompt.metadata for prompt in chosen.prompts):
        sampled.append([without_places(prompt.metadata) for prompt in chosen.prompts])
    return hashlib.sha256(json.dumps([sampled, scorers], sort_keys=True).encode()).hexdigest()[:16]


def _without_frames(scorer: dict[str, Any]) -> dict[str, Any]:
    """Leave the keys on frames out where they are as by default, as in runs before there were clips."""
    defaults = {"frames": "mean", "scored_frames": None}
    return {key: value for key, value in scorer.items() if key not in defaults or value != defaults[key]}


def judge(
    recipe: Recipe,
    version: EvalVersion,
    variants: dict[str, EvalResult],
    images: dict[str, float],
    base: JudgedVersion | None,
    possible: RewardRange | None = None,
) -> tuple[JudgedVersion, LogEntry]:
    """Judge a version against the pretrained model.

    Args:
        recipe: with `[evaluation]` and `[guard]`.
        version: the version, with its KL to the pretrained model if that was measured.
        variants: its results: "current", and "average" if the recipe keeps a moving average.
        images: its image statistics.
        base: the pretrained model; None if this version is the pretrained model itself.
        possible: the range of the weighted sum of the rewards, if they are bounded.

    Returns:
        The version with its alarms, and its entry for evaluations.jsonl.
    """
    scores = variants["current"].scores
    saturated = saturation(scores[WEIGHTED_SUM], possible) if possible else None
    suite, prompts = recipe.evaluation.followed, variants["current"].prompts
    means = {name: mean_score(suite, prompts, values) for name, values in scores.items()}
    stats = VersionStats(scores, images, version.kl_reference_nats, saturated, means)
    before = (base.stats if base else stats).scores
    scorers = [table.called for table in recipe.scorers]
    found = tuple(alarms(base.stats, stats, scorers, recipe.guard)) if base else ()
    entry = {
        "policy_version": version.policy_version,
        "images": len(variants["current"].seeds),
        "scores": {name: _score_entry(before[name], name, variants, suite) for name in stats.scores},
        "image_statistics": images,
        "kl_reference_nats": version.kl_reference_nats,
        "saturation": saturated,
        "alarms": [{"about": alarm.about, "says": alarm.says} for alarm in found],
    }
    return JudgedVersion(version.policy_version, stats, found), entry


def _score_entry(
    before: np.ndarray, name: str, variants: dict[str, EvalResult], suite: Suite | None
) -> dict[str, float]:
    """Return mean and change of one score for evaluations.jsonl, and its mean by category if prompts have one."""
    means, current = {"current": "mean", "average": "average_mean"}, variants["current"]
    prompts, now = current.prompts, current.scores[name]
    entry = {means[variant]: mean_score(suite, prompts, result.scores[name]) for variant, result in variants.items()}
    if suite and (error := suite_means(suite, prompts, now)[0].standard_error) is not None:
        entry["mean_error"] = error
    if change := change_of_means(suite, prompts, before, now):
        entry |= {"change": change.change, "standard_error": change.error}
    categories = means_by_category(prompts, now.astype(np.float64))
    return entry | {f"category/{category}": mean for category, mean in categories.items()}


def judged_from_log(entry: LogEntry, scores: dict[str, np.ndarray]) -> JudgedVersion:
    """Restore an evaluated version from its entry in evaluations.jsonl and its images' scores."""
    images = {name: math.nan if value is None else value for name, value in entry["image_statistics"].items()}
    found = tuple(Alarm(alarm["about"], alarm["says"]) for alarm in entry["alarms"])
    means = {name: math.nan if (mean := of["mean"]) is None else mean for name, of in entry["scores"].items()}
    stats = VersionStats(scores, images, entry["kl_reference_nats"], entry.get("saturation"), means)
    return JudgedVersion(entry["policy_version"], stats, found)


def eval_metrics(entry: LogEntry) -> dict[str, float]:
    """Return an entry of evaluations.jsonl as metrics for the trackers."""
    metrics = {"evaluation/policy_version": float(entry["policy_version"])}
    for name, values in entry["scores"].items():
        metrics |= {f"evaluation/{name}/{statistic}": value for statistic, value in values.items()}
    metrics |= {f"evaluation/images/{name}": value for name, value in entry["image_statistics"].items()}
    if entry.get("saturation") is not None:
        metrics["evaluation/saturation"] = entry["saturation"]
    metrics["guard/alarms"] = float(len(entry["alarms"]))
    if entry["best_version"] is not None:
        metrics["guard/best_version"] = float(entry["best_version"])
    return metrics
