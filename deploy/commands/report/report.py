"""ddpo report: what a run has changed, as a page to look at, its images one by one, and summary.json."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.metrics.statistics import paired_error
from ray_ddpo.common.model_files.weight_files import network_folder
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.evaluation_log import EvaluationLog
from ray_ddpo.common.run_storage.reading import read_json_lines
from ray_ddpo.common.run_storage.run_folder import RunFolder, weights_here
from ray_ddpo.common.run_storage.storage import local_folder
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.commands.report.evaluation import evaluated, shown_versions
from ray_ddpo.deploy.commands.report.images import before_after_image, reward_curve, versions_image
from ray_ddpo.deploy.commands.report.page import FinishedRun, report_page
from ray_ddpo.deploy.commands.report.scores import paired, share_kept
from ray_ddpo.deploy.commands.settings import differing_settings, image_settings
from ray_ddpo.deploy.commands.weights.given_base import check_base
from ray_ddpo.deploy.commands.weights.run_weights import RunWeights, run_weights
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.deploy.evaluation.held_out import HeldOut, scorers_of


def report(run: str, overrides: list[str]) -> str:
    """Write the report into the run's folder; what it says, in words. ValueError: no run there, or one without a checkpoint."""
    start = time.perf_counter()
    folder = RunFolder(run)
    recipe = folder.load_recipe(overrides)
    weights, rounds = run_weights(folder), logged_rounds(folder)
    parts = build_components(recipe)
    comparison = compare(parts, weights.location, lambda base: check_base(folder, base, overrides))
    differing = differing_settings([folder.location], parts.resolved())
    figures = figures_of(comparison, recipe, rounds, weights) | {"seconds_report": time.perf_counter() - start}
    figures |= {"settings": image_settings(parts.resolved()), "differs_from_training": differing}
    figures |= {"start_from": recipe.start_from.model_dump()} if recipe.start_from else {}
    with local_folder(folder.report) as path:
        before_after_image(comparison, path / "before_after.png")
        reward_curve(rounds, path / "reward_curve.png")
        versions_image(EvaluationLog(folder.storage), shown_versions(evaluated(folder)), path / "versions.png")
    finished = FinishedRun(folder, recipe, overrides, rounds, weights.fingerprint, weights.policy_version)
    folder.report.write("report.html", report_page(finished, comparison).encode())
    folder.report.write("summary.json", json.dumps(figures, indent=1).encode())
    return in_words(figures, folder)


def figures_of(
    comparison: Comparison, recipe: Recipe, rounds: list[dict[str, float]], weights: RunWeights
) -> dict[str, Any]:
    """What summary.json says of these weights."""
    return summary(comparison, list(scorers_of(recipe))) | {
        "fingerprint": weights.fingerprint,
        "policy_version": weights.policy_version,
        "seconds": sum(metrics["seconds/round"] for metrics in rounds),
    }


def logged_rounds(folder: RunFolder) -> list[dict[str, float]]:
    """What the run has logged, an entry a round, NaN for `null`; without a last line that a kill cut off."""
    if not folder.storage.exists(folder.metrics):
        raise ValueError(f"{folder.location} has no {folder.metrics}: no round of the run is known")
    rounds = read_json_lines(folder.storage, folder.metrics, ("round", "seconds/round"))
    return [{name: math.nan if value is None else value for name, value in metrics.items()} for metrics in rounds]


def compare(parts: Components, location: str, check: Callable[[Base], None]) -> Comparison:
    """Sample and score the evaluation's images under the pretrained weights, then under those that lie at `location`.

    `check`: told first what was loaded, to refuse it.
    """
    recipe, held_out = parts.recipe, HeldOut(parts)
    policy = parts.policy.load(settle(recipe.runtime), recipe.sampling, "sampler")
    check(parts.policy.loaded_base("sampler") | held_out.loaded_parts() | prompts_base(parts))
    with reference_policy(policy.network):
        before = held_out.images(policy)
    with weights_here(location) as path:
        policy.restore(network_folder(path) or path)
    after = held_out.images(policy)
    return Comparison(held_out.chosen, before.pixels, after.pixels, before.scores, after.scores)


def summary(comparison: Comparison, scorers: list[str]) -> dict[str, Any]:
    """The figures of summary.json; the standard error is of the mean paired difference."""
    before, after = paired(comparison, "reward")
    return {
        "reward_before": float(before.mean()),
        "reward_after": float(after.mean()),
        "paired_standard_error": paired_error(before, after),
        "images_compared": len(before),
        "scorers": {name: _scorer_figures(comparison, name) for name in scorers},
    }


def _scorer_figures(comparison: Comparison, name: str) -> dict[str, float]:
    before, after = paired(comparison, name)
    kept = share_kept(before, after)  # of a yes-or-no scorer: how many it still says yes to
    figures = {"before": float(before.mean()), "after": float(after.mean())}
    return figures if kept is None else {**figures, "kept": kept}


def in_words(figures: dict[str, Any], folder: RunFolder) -> str:
    """The report on the terminal: the figures, then where everything lies."""
    versions = ("versions.png",) if folder.report.exists("versions.png") else ()
    files = ("report.html", "before_after.png", "reward_curve.png", *versions, "summary.json")
    return "\n".join([*changes(figures), "look at:", *(f"  {folder.report.location}/{name}" for name in files)])


def changes(figures: dict[str, Any]) -> list[str]:
    """The figures, a line each, and whose they are."""
    before, after, error = figures["reward_before"], figures["reward_after"], figures["paired_standard_error"]
    errors = f" ({(after - before) / error:+.1f} paired standard errors)" if error else ""
    change = f", {100 * (after - before) / abs(before):+.1f} %" if before else ""
    lines = [
        f"reward on {figures['images_compared']} held-out images, same prompts and noise: "
        f"{before:.3f} before, {after:.3f} after{change}{errors}"
    ]
    for name, values in figures["scorers"].items():
        kept = f"; of those with 1 before, {100 * values['kept']:.0f} % still have it" if "kept" in values else ""
        lines.append(f"{name}: {values['before']:.3f} before, {values['after']:.3f} after{kept}")
    lines += figures.get("differs_from_training", [])
    if start := figures.get("start_from"):
        lines.append(f"started from {start['run']} after round {start['round']}, weights {start['fingerprint'][:12]}")
    return [*lines, f"weights after round {figures['policy_version']}: fingerprint {figures['fingerprint'][:12]}"]
