"""ddpo evaluate: the same held-out pictures under several weights, and how far each reward and scorer moved between them."""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from common.config import Recipe
from common.evaluation_log import EvaluatedImages, images_table
from common.paired import in_errors, paired_change
from common.run_folder import weights_here
from deploy.commands.given_weights import load_policy, recipe_of
from deploy.commands.held_out import JOINED, HeldOut, scorers_of
from deploy.commands.report_page.scores import headline, share_kept
from deploy.commands.report_pictures import COLUMNS, rows_picture
from deploy.parts import parts_of

PRETRAINED = "pretrained"  # the model as it was before any training
FIGURES, IMAGES, PICTURES = "evaluation.json", "images.parquet", "pictures.png"


@dataclass(frozen=True)
class EvaluateRequest:
    """Which weights are compared with which, and where that is written."""

    weights: tuple[str, ...]  # each a run's folder, its best/, or a LoRA's file or folder
    against: str  # the same, or PRETRAINED
    recipe: str | None
    output: str


def evaluate(request: EvaluateRequest, overrides: list[str]) -> str:
    """Draw, score, compare and write; what was found, in words.

    ValueError: weights are named twice, are not there or do not fit, or nobody says whose model they are for.
    """
    named = [*request.weights, request.against]
    twice = sorted({location for location in named if named.count(location) > 1})
    if twice:
        raise ValueError(f"{twice} is named twice: weights are compared with others")
    recipe = recipe_of([location for location in named if location != PRETRAINED], request.recipe, overrides)
    found = _drawn(recipe, named)
    baseline = found[request.against]
    compared = {location: changes(recipe, baseline, found[location]) for location in request.weights}
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    _write(output, {request.against: baseline, **found}, {"against": request.against, "weights": compared})
    images = f"{len(baseline.seeds)} held-out pictures, same prompts and noise, against {request.against}"
    tables = [in_words(location, figures) for location, figures in compared.items()]
    return "\n".join([images, *tables, "look at:", *(f"  {output / name}" for name in (PICTURES, IMAGES, FIGURES))])


def _drawn(recipe: Recipe, named: list[str]) -> dict[str, EvaluatedImages]:
    held_out = HeldOut(parts_of(recipe))
    with ExitStack() as copies:
        paths: dict[str, Path | None] = {PRETRAINED: None}
        paths |= {
            location: copies.enter_context(weights_here(location)) for location in named if location != PRETRAINED
        }
        for location in named[1:]:
            load_policy(recipe, paths[location])  # what does not fit is to be found before anything is drawn
        found = {}
        for location in named:
            policy = load_policy(recipe, paths[location])
            print(f"{location}: draws {len(held_out.chosen.seeds)} pictures", file=sys.stderr, flush=True)
            found[location] = held_out.images(policy)
            del policy  # or the next one would be loaded beside it
    return found


def changes(recipe: Recipe, before: EvaluatedImages, after: EvaluatedImages) -> dict[str, dict[str, float] | None]:
    """Of each reward and scorer: its means, their difference and its paired standard error; None: fewer than two pictures."""
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
        return "fewer than two pictures could be scored both times"
    before, after = figures["before"], figures["after"]
    errors = in_errors(figures["change"], figures["paired_standard_error"])
    said = [f"{before:.4g} → {after:.4g}"]
    said += [f"{100 * figures['change'] / abs(before):+.1f} %"] if before else []
    said += [f"{errors:+.1f} paired standard errors"] if errors is not None else []
    said += [f"of those with 1 before {100 * figures['kept']:.0f} % still have it"] if "kept" in figures else []
    return ", ".join(said)


def _write(output: Path, found: dict[str, EvaluatedImages], figures: dict[str, Any]) -> None:
    """The figures, a row an image and weights with its scores and picture, and the first pictures beside one another."""
    (output / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tables = [images_table(location, images, len(images.seeds)) for location, images in found.items()]
    parquet.write_table(pa.concat_tables(tables), output / IMAGES)
    rows = [(location, list(images.pixels[:COLUMNS]), "black") for location, images in found.items()]
    rows_picture(rows, output / PICTURES, [prompt.text for prompt in next(iter(found.values())).prompts[:COLUMNS]])
