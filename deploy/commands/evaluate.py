"""ddpo evaluate: sample the same held-out images under several weights, and compare their rewards and scores."""

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.clips import mosaic
from ray_ddpo.common.metrics.statistics import in_errors
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import weights_here
from ray_ddpo.common.video_files import mp4
from ray_ddpo.deploy.commands.report.images import COLUMNS, rows_image
from ray_ddpo.deploy.commands.report.scores import headline, share_kept
from ray_ddpo.deploy.commands.settings import differing_settings, kept_settings, settings_in_words
from ray_ddpo.deploy.commands.weights.given_base import check_given
from ray_ddpo.deploy.commands.weights.given_weights import default_output, load_policy, recipe_of, refuse_output_file
from ray_ddpo.deploy.driver.components import SCORING, Components, build_components
from ray_ddpo.deploy.driver.reward_prompts import check_rewards_prompts
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.deploy.evaluation.categories import change_of_means
from ray_ddpo.deploy.evaluation.eval_log import images_table
from ray_ddpo.deploy.evaluation.eval_result import WEIGHTED_SUM, EvalResult, EvalScorer, scorer_tables, suite_told

OUTPUT = "evaluation"  # the default folder; if it holds a result, evaluation-2 and so on
PRETRAINED = "pretrained"  # the model before any training
STATS, ROWS, IMAGES = FILES = ("evaluation.json", "images.parquet", "images.png")
CLIPS = "images.mp4"  # of a family of video: the clips whose posters are in IMAGES, in the same places
CLIPS_BYTES = 20_000_000
CLIPS_EDGE = 1920  # pixels


def evaluate(
    weights: Sequence[str], against: str, recipe_name: str | None, output_name: str | None, overrides: list[str]
) -> str:
    """Sample, score, compare, and write the results. Return a summary for the terminal.

    Args:
        weights: what to compare, each a run's folder, its best/, or a LoRA's file or folder.
        against: the baseline: weights like these, or PRETRAINED.
        recipe_name: the recipe to use; by default that of the first run among the weights.
        output_name: the folder for the results; by default a new one in the first run's.
        overrides: of the recipe.

    Raises:
        ValueError: weights are named twice, are missing or do not fit, or no recipe names their base model.
    """
    named = [*weights, against]
    twice = sorted({location for location in named if named.count(location) > 1})
    if twice:
        raise ValueError(f"{twice} is named twice: weights are compared with others")
    given = [location for location in named if location != PRETRAINED]
    recipe, output = recipe_of(given, recipe_name, overrides), new_output(output_name, given, OUTPUT, FILES)
    components = build_components(recipe, used=SCORING)
    check_rewards_prompts(components, trains=False)
    found = results(components, named, lambda base: check_given(given, recipe_name, base, overrides))
    baseline = found[against]
    compared = {location: changes(recipe, baseline, found[location]) for location in weights}
    output.mkdir(parents=True, exist_ok=True)
    settings, differing = kept_settings(components, baseline), differing_settings(given, components.resolved())
    stats = {"against": against, "weights": compared, "settings": settings, "differs_from_training": differing}
    chosen = build_eval_set(recipe.evaluation, components.prompts)
    if chosen.suite:
        each = {location: result.scores for location, result in {against: baseline, **found}.items()}
        stats["suite"] = suite_told(chosen, each, list(scorer_tables(recipe)))
    _write(output, {against: baseline, **found}, stats)
    compared_images = f"{chosen.in_words}, same prompts and noise, against {against}"
    tables = [in_words(location, scores) for location, scores in compared.items()]
    lines = [compared_images, settings_in_words(settings), *differing, *tables, "look at:"]
    shown = (*((CLIPS,) if (output / CLIPS).exists() else ()), IMAGES, ROWS, STATS)
    return "\n".join([*lines, *(f"  {output / name}" for name in shown)])


def new_output(asked: str | None, weights: list[str], default: str, files: Sequence[str]) -> Path:
    """Return a folder without an earlier result: the one asked for, else a new one in the run's folder.

    Args:
        asked: the folder asked for, if any.
        weights: what is evaluated.
        default: name of the new folder; if that has a result, `default-2` and so on.
        files: names of a result's files.

    Raises:
        ValueError: the requested folder holds a result, or is a file.
    """

    def is_taken(folder: Path) -> bool:
        return any((folder / name).exists() for name in files)

    if asked is None:
        first = default_output(weights, default)
        others = (first.with_name(f"{default}-{count}") for count in itertools.count(2))
        return next(folder for folder in itertools.chain([first], others) if not is_taken(folder))
    if is_taken(Path(asked)):
        raise ValueError(f"--output is {asked!r}, which has the result of an earlier evaluation: give another folder")
    refuse_output_file(Path(asked))
    return Path(asked)


def results(components: Components, named: list[str], check: Callable[[Base], None]) -> dict[str, EvalResult]:
    """Sample and score the evaluation set under each of the named weights.

    Args:
        components: the recipe's components.
        named: the weights; the last are the baseline.
        check: called with the fingerprints of all loaded files. Refuses files that the weights were not trained on.
    """
    recipe, scorer = components.recipe, EvalScorer(components)
    with ExitStack() as copies:
        paths = {
            location: copies.enter_context(weights_here(location)) if location != PRETRAINED else None
            for location in named
        }
        for location in named[1:]:
            load_policy(recipe, paths[location])  # so that weights that do not fit are refused before any sampling
        check(components.policy.loaded_base("sampler") | scorer.loaded_parts() | prompts_base(components))
        found = {}
        for location in named:
            policy = load_policy(recipe, paths[location])
            found[location] = scorer.evaluate(policy, location)
            del policy  # so that two policies are never in memory together
    return found


def changes(recipe: Recipe, before: EvalResult, after: EvalResult) -> dict[str, dict[str, float] | None]:
    """Compare two results by reward and scorer: means, their difference, and its paired standard error.

    A value is None if fewer than two images have a score in both results.
    """
    names = [*([WEIGHTED_SUM] if headline(recipe) == WEIGHTED_SUM else []), *scorer_tables(recipe)]
    return {name: _change(recipe, before, after, name) for name in names}


def _change(recipe: Recipe, earlier: EvalResult, later: EvalResult, name: str) -> dict[str, float] | None:
    """Compare one score of two results, by the rule of the recipe's suite if it follows one."""
    before, after = earlier.scores[name], later.scores[name]
    found = change_of_means(recipe.evaluation.followed, earlier.prompts, before, after)
    if found is None:
        return None
    both = np.isfinite(before) & np.isfinite(after)
    kept = share_kept(before[both], after[both])
    stats = {"images": found.images, "before": found.before, "after": found.after, "change": found.change}
    error = found.error if np.isfinite(found.error) else None
    return {**stats, "paired_standard_error": error} | ({} if kept is None else {"kept": kept})


def in_words(location: str, compared: dict[str, dict[str, float] | None]) -> str:
    """Format the comparison of one set of weights with the baseline, one line a reward or scorer."""
    width = max(map(len, compared))
    return "\n".join([location, *(f"  {name:<{width}}  {_line(stats)}" for name, stats in compared.items())])


def _line(stats: dict[str, float] | None) -> str:
    """Format the change of one score."""
    if stats is None:
        return "fewer than two images could be scored both times"
    before, after = stats["before"], stats["after"]
    error = stats["paired_standard_error"]
    errors = None if error is None else in_errors(stats["change"], error)
    said = [f"{before:.4g} → {after:.4g}"]
    said += [f"{100 * stats['change'] / abs(before):+.1f} %"] if before else []
    said += [f"{errors:+.1f} paired standard errors"] if errors is not None else []
    said += [f"of those with 1 before {100 * stats['kept']:.0f} % still have it"] if "kept" in stats else []
    return ", ".join(said)


def _write(output: Path, found: dict[str, EvalResult], stats: dict[str, Any]) -> None:
    """Write the statistics, a table with one row an image and weights, and the first images side by side."""
    (output / STATS).write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    tables = [images_table(location, result, len(result.seeds)) for location, result in found.items()]
    parquet.write_table(pa.concat_tables(tables), output / ROWS)
    rows = [(location, list(result.pixels[:COLUMNS]), "black") for location, result in found.items()]
    if (rate := next(iter(found.values())).frame_rate) is not None:
        shown = mosaic([result.pixels[:COLUMNS] for result in found.values()])
        (output / CLIPS).write_bytes(mp4(shown, rate, CLIPS_BYTES, CLIPS_EDGE))
    rows_image(rows, output / IMAGES, [prompt.text for prompt in next(iter(found.values())).prompts[:COLUMNS]])
