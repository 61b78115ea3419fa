"""ddpo report: write report.html, its images as files, and summary.json, from a comparison on held-out images."""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from ray_ddpo.common.run_storage.storage import local_folder
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.commands.report.evaluation import evaluated_versions, shown_versions
from ray_ddpo.deploy.commands.report.images import before_after_image, reward_curve, versions_image
from ray_ddpo.deploy.commands.report.page import FinishedRun, report_page
from ray_ddpo.deploy.commands.report.scores import paired, paired_means, share_kept
from ray_ddpo.deploy.commands.settings import differing_settings, image_settings
from ray_ddpo.deploy.commands.weights.given_base import check_base
from ray_ddpo.deploy.commands.weights.run_weights import RunWeights, run_weights
from ray_ddpo.deploy.driver.components import NOTHING_GIVEN, SCORING, Components, Given, build_components
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import EvalComparison, EvalScorer, scorer_tables, suite_told


def report(run: str, overrides: list[str], given: Given = NOTHING_GIVEN) -> str:
    """Write the report into the run's folder, and print its progress to standard error.

    Returns:
        A summary for the terminal.

    Raises:
        ValueError: the folder holds no run, or a run without a checkpoint.
    """
    start = time.perf_counter()
    folder = RunFolder(run)
    recipe = folder.load_recipe(overrides)
    weights, rounds = run_weights(folder), logged_rounds(folder)
    _say(f"{len(rounds)} rounds read from {folder.location}")
    components = build_components(recipe, given, SCORING)
    comparison = compare(components, weights.location, lambda base: check_base(folder, base, overrides))
    differing = differing_settings([folder.location], components.resolved())
    stats = report_stats(comparison, recipe, rounds, weights) | {"seconds_report": time.perf_counter() - start}
    stats |= {"settings": image_settings(components.resolved()), "differs_from_training": differing}
    stats |= {"start_from": recipe.start_from.model_dump()} if recipe.start_from else {}
    _say("makes the images and the page")
    with local_folder(folder.report) as path:
        before_after_image(comparison, path / "before_after.png")
        reward_curve(rounds, path / "reward_curve.png", str(stats["made"]))
        versions_image(EvalLog(folder.storage), shown_versions(evaluated_versions(folder)), path / "versions.png")
    finished = FinishedRun(folder, recipe, overrides, rounds, weights.fingerprint, weights.policy_version)
    folder.report.write("report.html", report_page(finished, comparison).encode())
    folder.report.write("summary.json", json.dumps(stats, indent=1).encode())
    return in_words(stats, folder)


def _say(text: str) -> None:
    print(f"report: {text}", file=sys.stderr, flush=True)


def report_stats(
    comparison: EvalComparison, recipe: Recipe, rounds: list[dict[str, float]], weights: RunWeights
) -> dict[str, Any]:
    """Return the content of summary.json for these weights."""
    return summary(comparison, list(scorer_tables(recipe))) | {
        "made": "images" if comparison.frame_rate is None else "clips",
        "fingerprint": weights.fingerprint,
        "policy_version": weights.policy_version,
        "seconds": sum(metrics["seconds/round"] for metrics in rounds),
    }


def logged_rounds(folder: RunFolder) -> list[dict[str, float]]:
    """Read metrics.jsonl, an entry a round, without a last line that a kill cut off; `null` becomes NaN."""
    if not folder.storage.exists(folder.metrics):
        raise ValueError(f"{folder.location} has no {folder.metrics}: no round of the run is known")
    rounds = read_json_lines(folder.storage, folder.metrics, ("round", "seconds/round"))
    return [{name: math.nan if value is None else value for name, value in metrics.items()} for metrics in rounds]


def compare(components: Components, location: str, check: Callable[[Base], None]) -> EvalComparison:
    """Sample and score the evaluation set under the pretrained weights, then under those at `location`.

    Args:
        components: the recipe's components.
        location: a run's folder or its best/.
        check: called with the fingerprints of all loaded files. Refuses files that the weights were not trained on.
    """
    recipe, scorer = components.recipe, EvalScorer(components)
    policy = components.policy.load(settle(recipe.runtime), recipe.sampling, "sampler")
    check(components.policy.loaded_base("sampler") | scorer.loaded_parts() | prompts_base(components))
    with reference_policy(policy.network):
        before = scorer.evaluate(policy, "pretrained model")
    with weights_here(location) as path:
        policy.restore(network_folder(path) or path)
    after = scorer.evaluate(policy, "trained weights")
    return EvalComparison(scorer.chosen, before.pixels, after.pixels, before.scores, after.scores, before.frame_rate)


def summary(comparison: EvalComparison, scorers: list[str]) -> dict[str, Any]:
    """Return the scores of summary.json. The standard error is of the mean paired difference."""
    before, _ = paired(comparison, "reward")
    change = paired_means(comparison, "reward")
    stats = {
        "reward_before": change.before,
        "reward_after": change.after,
        "paired_standard_error": change.error if math.isfinite(change.error) else None,
        "images_compared": len(before),
        "scorers": {name: _scorer_stats(comparison, name) for name in scorers},
    }
    if comparison.chosen.suite:
        both = {"before": comparison.scores_before, "after": comparison.scores_after}
        stats["suite"] = suite_told(comparison.chosen, both, scorers)
    return stats


def _scorer_stats(comparison: EvalComparison, name: str) -> dict[str, float]:
    before, after = paired(comparison, name)
    kept = share_kept(before, after)  # of a scorer of 0 and 1: the share of ones that stay ones
    change = paired_means(comparison, name)
    stats = {"before": change.before, "after": change.after}
    return stats if kept is None else {**stats, "kept": kept}


def in_words(stats: dict[str, Any], folder: RunFolder) -> str:
    """Format the report for the terminal: statistics, then paths."""
    versions = ("versions.png",) if folder.report.exists("versions.png") else ()
    files = ("report.html", "before_after.png", "reward_curve.png", *versions, "summary.json")
    return "\n".join([*changes(stats), "look at:", *(f"  {folder.report.location}/{name}" for name in files)])


def changes(stats: dict[str, Any]) -> list[str]:
    """Format the statistics, one line each, and the weights that they belong to."""
    before, after, error = stats["reward_before"], stats["reward_after"], stats["paired_standard_error"]
    errors = f" ({(after - before) / error:+.1f} paired standard errors)" if error else ""
    change = f", {100 * (after - before) / abs(before):+.1f} %" if before else ""
    lines = [
        f"reward on {stats['images_compared']} held-out {stats.get('made', 'images')}, same prompts and noise: "
        f"{before:.3f} before, {after:.3f} after{change}{errors}"
    ]
    for name, values in stats["scorers"].items():
        kept = f"; of those with 1 before, {100 * values['kept']:.0f} % still have it" if "kept" in values else ""
        lines.append(f"{name}: {values['before']:.3f} before, {values['after']:.3f} after{kept}")
    lines += [f"scores are those of {stats['suite']['images']}"] if "suite" in stats else []
    lines += stats.get("differs_from_training", [])
    if start := stats.get("start_from"):
        lines.append(f"started from {start['run']} after round {start['round']}, weights {start['fingerprint'][:12]}")
    return [*lines, f"weights after round {stats['policy_version']}: fingerprint {stats['fingerprint'][:12]}"]
