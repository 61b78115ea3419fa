"""Run a suite: fixed prompts and seeds under each of the weights, scored, as table, JSON, HTML and images."""

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import ValidationError

from ray_ddpo.common.prompts import PromptSource
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import explain
from ray_ddpo.common.recipe.tables import AggregationTable, RewardTable
from ray_ddpo.common.suite_prompts import prompts_sha256, suite_source
from ray_ddpo.common.suites import SUITES, Suite
from ray_ddpo.deploy.commands.evaluate import PRETRAINED, new_output, results
from ray_ddpo.deploy.commands.settings import differing_settings, kept_settings, settings_in_words
from ray_ddpo.deploy.commands.suite.page import suite_page
from ray_ddpo.deploy.commands.weights.given_base import check_given
from ray_ddpo.deploy.commands.weights.given_weights import recipe_of
from ray_ddpo.deploy.driver.components import SCORING, Given, build_components
from ray_ddpo.deploy.driver.reward_prompts import check_rewards_prompts
from ray_ddpo.deploy.evaluation.categories import TOTAL, CategoryMean, best_of, suite_means
from ray_ddpo.deploy.evaluation.eval_log import images_table
from ray_ddpo.deploy.evaluation.eval_result import EvalResult

JSON, PAGE, ROWS = FILES = ("suite.json", "suite.html", "images.parquet")
# With these words, other rewards and prompts than those of the run are no fault.
OTHERS = ("--rewards", "--prompts")
# Keys in whose place a suite has its own.
REPLACED = (
    "reward",
    "rewards",
    "aggregation",
    "prompts",
    *(f"evaluation.{key}" for key in ("suite", "prompts", "prompts_from", "images", "scorers")),
)

Means = dict[str, dict[str, CategoryMean]]  # by weights, then by category or TOTAL


def evaluate_suite(options: argparse.Namespace) -> str:
    """Sample and score a suite under each of the weights, and write the results. Return tables for the terminal.

    Raises:
        ValueError: there is no such suite, its prompts or a scorer's files are missing, or weights do not fit.
    """
    if options.suite not in SUITES:
        raise ValueError(f"--suite is {options.suite!r}: it must be one of {list(SUITES)}")
    suite = SUITES[options.suite]
    refuse_replaced(options.overrides)
    # The baseline is part of the table, unless it is one of the weights.
    named = list(dict.fromkeys([options.against, *options.weights]))
    given = [location for location in named if location != PRETRAINED]
    scorers = scorer_tables(options.scorers) if options.scorers else [checked(table) for table in suite.scorers]
    source = suite_source(suite, Path(options.prompts_from), "--prompts-from")
    if not given and options.recipe is None:
        raise ValueError("the pretrained model alone needs --recipe, which says what model that is")
    recipe = suite_recipe(recipe_of(given, options.recipe, options.overrides), suite, source, scorers)
    output = new_output(options.output, given, f"suite-{options.suite}", FILES)
    components = build_components(recipe, Given(prompts=source), used=SCORING)
    check_rewards_prompts(components, trains=False)
    others = [*options.overrides, *OTHERS]
    found = results(components, named, lambda base: check_given(given, options.recipe, base, others))
    found = {location: found[location] for location in named}
    baseline = found[options.against]
    means = {table.called: means_by_weights(suite, found, table.called) for table in scorers}
    settings = kept_settings(components, baseline)
    differing = differing_settings(given, components.resolved())
    told = {
        "suite": options.suite,
        "about": suite.about,
        "prompts": len(source.evaluated()),
        "prompts_sha256": prompts_sha256(source.evaluated()),
        "images_per_prompt": suite.images_per_prompt,
        "against": options.against,
        "scores": {name: scores_as_json(suite, found, name, options.against) for name in means},
        "settings": settings,
        "differs_from_training": differing,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / JSON).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (output / PAGE).write_text(suite_page(told, settings_in_words(settings), found), encoding="utf-8")
    tables = [images_table(location, result, len(result.seeds)) for location, result in found.items()]
    parquet.write_table(pa.concat_tables(tables), output / ROWS)
    head = f"{options.suite}: {suite.about}; {told['prompts']} prompts, {suite.images_per_prompt} images each"
    lines = [head, settings_in_words(settings), *differing]
    lines += [line for name, of_scorer in means.items() for line in table_lines(name, of_scorer)]
    lines += ["", "mean ± half of the 95 % confidence interval; * marks the best weights of a row"]
    return "\n".join([*lines, "look at:", *(f"  {output / name}" for name in FILES)])


def refuse_replaced(overrides: Sequence[str]) -> None:
    """Raise ValueError for a key that would have no effect, because the suite replaces it."""
    keys = [word.removeprefix("--").partition("=")[0] for word in overrides if word.startswith("--")]
    for key in keys:
        if any(key == name or key.startswith(f"{name}.") for name in REPLACED):
            raise ValueError(
                f"--{key} has no effect on a suite, which has prompts, number of images and scorers of its own: leave it "
                "out; --scorers gives other scorers"
            )


def scorer_tables(text: str) -> list[RewardTable]:
    """Read `--scorers`, a list of tables in TOML. Raise ValueError if it is none."""
    try:
        tables = tomllib.loads(f"scorers = {text}")["scorers"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--scorers is {text!r}, which is no list of tables in TOML: {error}") from None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"""--scorers is {text!r}: it must be a list of tables, such as '[{{ name = "ocr" }}]'""")
    found = [checked(table) for table in tables]
    names = [table.called for table in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--scorers are called {names}: give a label to those of one name")
    return found


def checked(table: dict[str, Any]) -> RewardTable:
    """Return a scorer's table. Raise ValueError if a key is wrong."""
    try:
        return RewardTable.model_validate(table)
    except ValidationError as error:
        raise ValueError(explain(error, RewardTable, "scorers.")) from error


def suite_recipe(recipe: Recipe, suite: Suite, source: PromptSource, scorers: Sequence[RewardTable]) -> Recipe:
    """Return the recipe with the suite's scorers and number of images, and without the run's own rewards."""
    images = len(source.evaluated()) * suite.images_per_prompt
    evaluation = recipe.evaluation.model_copy(update={"suite": "none", "prompts": (), "images": images, "scorers": ()})
    rewards = {"reward": None, "rewards": tuple(scorers), "aggregation": AggregationTable()}
    return recipe.model_copy(update={**rewards, "evaluation": evaluation})


def means_by_weights(suite: Suite, found: dict[str, EvalResult], scorer: str) -> Means:
    """Return the means of one scorer: by weights, and by category with the whole suite first."""
    means: Means = {}
    for location, result in found.items():
        total, of_category = suite_means(suite, result.prompts, result.scores[scorer])
        means[location] = {TOTAL: total, **of_category}
    return means


def scores_as_json(suite: Suite, found: dict[str, EvalResult], scorer: str, against: str) -> dict[str, Any]:
    """Return one scorer's means by weights and category, their paired changes, and the best weights by category."""
    means = means_by_weights(suite, found, scorer)
    changes = {}
    for location, result in found.items():
        if location != against:
            now, before = (each.scores[scorer].astype(np.float64) for each in (result, found[against]))
            total, of_category = suite_means(suite, result.prompts, now - before)
            changes[location] = {TOTAL: total.as_json()} | {name: each.as_json() for name, each in of_category.items()}
    return {
        "weights": {location: {name: each.as_json() for name, each in row.items()} for location, row in means.items()},
        "change": changes,
        "best": best_of(means),
    }


def table_lines(scorer: str, means: Means) -> list[str]:
    """Format one scorer's table: a row a category, a column the weights; * marks the best of several."""
    best, categories = best_of(means), list(dict.fromkeys(name for row in means.values() for name in row))
    wide = max(map(len, [scorer, *categories]))
    columns = {location: max(18, len(location)) for location in means}
    lines = ["", "  ".join([f"{scorer:<{wide}}", *(f"{location:>{size}}" for location, size in columns.items())])]
    for name in categories:
        cells = []
        for location, size in columns.items():
            mark = "*" if len(means) > 1 and best.get(name) == location else " "
            cells.append(f"{_cell(means[location].get(name)) + mark:>{size}}")
        lines.append("  ".join([f"{name:<{wide}}", *cells]))
    return lines


def _cell(mean: CategoryMean | None) -> str:
    if mean is None or not np.isfinite(mean.mean):
        return "–"
    interval = mean.interval
    return f"{mean.mean:.4g}" + (f" ± {mean.mean - interval[0]:.2g}" if interval else "")
