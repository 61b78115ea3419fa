"""ddpo evaluate: the same held-out images under several weights, and how far each reward and scorer moved between them."""

import itertools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.metrics.statistics import in_errors, paired_change
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.evaluation_log import EvaluatedImages, images_table
from ray_ddpo.common.run_storage.run_folder import weights_here
from ray_ddpo.deploy.commands.report.images import COLUMNS, rows_image
from ray_ddpo.deploy.commands.report.scores import headline, share_kept
from ray_ddpo.deploy.commands.settings import differing_settings, kept_settings, settings_in_words
from ray_ddpo.deploy.commands.weights.given_base import check_given
from ray_ddpo.deploy.commands.weights.given_weights import load_policy, recipe_of, refuse_output_file
from ray_ddpo.deploy.driver.components import Components, build_components
from ray_ddpo.deploy.driver.start import prompts_base
from ray_ddpo.deploy.evaluation.held_out import JOINED, HeldOut, scorers_of

OUTPUT = "evaluation"  # by default; where that is taken, evaluation-2 and so on
PRETRAINED = "pretrained"  # the model as it was before any training
FIGURES, IMAGES, IMAGES = "evaluation.json", "images.parquet", "images.png"


@dataclass(frozen=True)
class EvaluateRequest:
    """Which weights are compared with which, and where that is written."""

    weights: tuple[str, ...]  # each a run's folder, its best/, or a LoRA's file or folder
    against: str  # the same, or PRETRAINED
    recipe: str | None
    output: str | None  # none: a new folder


def evaluate(request: EvaluateRequest, overrides: list[str]) -> str:
    """SamplePrompt, score, compare and write; what was found, in words.

    ValueError: weights are named twice, are not there or do not fit, or nobody says whose model they are for.
    """
    named = [*request.weights, request.against]
    twice = sorted({location for location in named if named.count(location) > 1})
    if twice:
        raise ValueError(f"{twice} is named twice: weights are compared with others")
    given = [location for location in named if location != PRETRAINED]
    recipe, output = recipe_of(given, request.recipe, overrides), _output(request.output)
    parts = build_components(recipe)
    found = _drawn(parts, named, lambda base: check_given(given, request.recipe, base, overrides))
    baseline = found[request.against]
    compared = {location: changes(recipe, baseline, found[location]) for location in request.weights}
    output.mkdir(parents=True, exist_ok=True)
    settings, differing = kept_settings(parts, baseline), differing_settings(given, parts.resolved())
    figures = {
        "against": request.against,
        "weights": compared,
        "settings": settings,
        "differs_from_training": differing,
    }
    _write(output, {request.against: baseline, **found}, figures)
    images = f"{len(baseline.seeds)} held-out images, same prompts and noise, against {request.against}"
    tables = [in_words(location, figures) for location, figures in compared.items()]
    lines = [images, settings_in_words(settings), *differing, *tables, "look at:"]
    return "\n".join([*lines, *(f"  {output / name}" for name in (IMAGES, IMAGES, FIGURES))])


def _output(asked: str | None) -> Path:
    """A folder without an earlier result. ValueError: the one that is asked for has one."""
    if asked is None:
        candidates = itertools.chain([Path(OUTPUT)], (Path(f"{OUTPUT}-{count}") for count in itertools.count(2)))
        return next(folder for folder in candidates if not _is_taken(folder))
    if _is_taken(Path(asked)):
        raise ValueError(f"--output is {asked!r}, which has the result of an earlier evaluation: give another folder")
    refuse_output_file(Path(asked))
    return Path(asked)


def _is_taken(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FIGURES, IMAGES, IMAGES))


def _drawn(parts: Components, named: list[str], check: Callable[[Base], None]) -> dict[str, EvaluatedImages]:
    recipe, held_out = parts.recipe, HeldOut(parts)
    with ExitStack() as copies:
        paths: dict[str, Path | None] = {PRETRAINED: None}
        paths |= {
            location: copies.enter_context(weights_here(location)) for location in named if location != PRETRAINED
        }
        for location in named[1:]:
            load_policy(recipe, paths[location])  # what does not fit is to be found before anything is sampled
        check(parts.policy.loaded_base("sampler") | held_out.loaded_parts() | prompts_base(parts))
        found = {}
        for location in named:
            policy = load_policy(recipe, paths[location])
            print(f"{location}: samples {len(held_out.chosen.seeds)} images", file=sys.stderr, flush=True)
            found[location] = held_out.images(policy)
            del policy  # or the next one would be loaded beside it
    return found


def changes(recipe: Recipe, before: EvaluatedImages, after: EvaluatedImages) -> dict[str, dict[str, float] | None]:
    """Of each reward and scorer: its means, their difference and its paired standard error; None: fewer than two images."""
    names = [*([JOINED] if headline(recipe) == JOINED else []), *scorers_of(recipe)]
    return {name: _change(before.scores[name], after.scores[name]) for name in names}


def _change(before: np.ndarray, after: np.ndarray) -> dict[str, float] | None:
    found = paired_change(before, after)
    if found is None:
        return None
    both = np.isfinite(before) & np.isfinite(after)
    kept = share_kept(before[both], after[both])
    figures = {"images": found.images, "before": found.before, "after": found.after, "change": found.change}
    return {**figures, "paired_standard_error": found.error} | ({} if kept is None else {"kept": kept})


def in_words(location: str, compared: dict[str, dict[str, float] | None]) -> str:
    """A line a reward or scorer."""
    width = max(map(len, compared))
    return "\n".join([location, *(f"  {name:<{width}}  {_line(figures)}" for name, figures in compared.items())])


def _line(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "fewer than two images could be scored both times"
    before, after = figures["before"], figures["after"]
    errors = in_errors(figures["change"], figures["paired_standard_error"])
    said = [f"{before:.4g} → {after:.4g}"]
    said += [f"{100 * figures['change'] / abs(before):+.1f} %"] if before else []
    said += [f"{errors:+.1f} paired standard errors"] if errors is not None else []
    said += [f"of those with 1 before {100 * figures['kept']:.0f} % still have it"] if "kept" in figures else []
    return ", ".join(said)


def _write(output: Path, found: dict[str, EvaluatedImages], figures: dict[str, Any]) -> None:
    """The figures, a row an image and weights with its scores and image, and the first images beside one another."""
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tables = [images_table(location, images, len(images.seeds)) for location, images in found.items()]
    parquet.write_table(pa.concat_tables(tables), output / IMAGES)
    rows = [(location, list(images.pixels[:COLUMNS]), "black") for location, images in found.items()]
    rows_image(rows, output / IMAGES, [prompt.text for prompt in next(iter(found.values())).prompts[:COLUMNS]])
