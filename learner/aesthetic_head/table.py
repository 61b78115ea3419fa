"""Read a table of rated images: a path each, a rating or counts of votes, and perhaps the split."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.learner.aesthetic_head.formats import rows_of

SPLITS = ("train", "validation", "test")
COLUMNS = (
    "path, and one of rating, votes (a list) and votes_1 … votes_N (counts of the ratings 1 to N); "
    "split may be there too"
)


@dataclass(frozen=True)
class RatedImages:
    """N images in the table's order."""

    paths: tuple[str, ...]  # in the folder of images
    ratings: Float[np.ndarray, "N"]  # the mean of votes, if there are votes
    splits: tuple[str, ...] | None = None  # of SPLITS; None if the table has none


class BadCell(ValueError):
    """A cell has a wrong value. The message says which values are allowed; the reader adds table and location."""


def mean_rating(votes: Sequence[int | float]) -> float:
    """Return the mean rating from the counts of votes for the ratings 1, 2, …."""
    return sum(rating * count for rating, count in enumerate(votes, start=1)) / sum(votes)


def read_table(table: Path, format_name: str | None = None) -> RatedImages:
    """Read and check a table.

    Args:
        format_name: one of `formats.READERS`. None: recognize the format.

    Raises:
        ValueError: a column is missing, or a cell has a wrong value. The message names table, location and column.
    """
    rows = list(rows_of(table, format_name))
    if not rows:
        raise ValueError(f"the table {table} has no images: it needs the columns {COLUMNS}")
    columns = set(rows[0][1])
    try:
        rating = _rating_reader(columns)
    except BadCell as error:
        raise ValueError(f"the table {table} has the columns {sorted(columns)}: {error}") from None
    images, seen = [], {}
    for location, cells in rows:
        try:
            path, split = _path(cells["path"]), _split(cells.get("split")) if "split" in columns else None
            images.append((path, rating(cells), split))
        except BadCell as error:
            raise ValueError(f"{table}, {location}: {error}") from None
        if path in seen:
            raise ValueError(f"{table}, {location}: {path!r} stands in {seen[path]} too: an image has one row")
        seen[path] = location
    paths, ratings, splits = zip(*images, strict=True)
    return RatedImages(paths, np.array(ratings), splits if "split" in columns else None)


def _rating_reader(columns: set[str]) -> Callable[[dict[str, Any]], float]:
    """Return the function from a row's cells to its rating."""
    numbers = sorted(int(match[1]) for column in columns if (match := re.fullmatch(r"votes_(\d+)", column)))
    ways = [
        name
        for name, there in (("rating", "rating" in columns), ("votes", "votes" in columns), ("votes_1", numbers))
        if there
    ]
    if "path" not in columns or len(ways) != 1:
        raise BadCell(f"it needs {COLUMNS}")
    if ways == ["rating"]:
        return lambda cells: _number(cells["rating"], "rating")
    if ways == ["votes"]:
        return lambda cells: _of_votes(_listed(cells["votes"]), "votes")
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) < 2:
        raise BadCell("votes_… must be numbered 1, 2, … without a gap, two or more of them")
    return lambda cells: _of_votes([cells[f"votes_{number}"] for number in numbers], "votes_…")


def _path(cell: Any) -> str:
    if not isinstance(cell, str) or not cell:
        raise BadCell(f"column path is {cell!r}: it must be an image's path in the folder of images")
    return cell


def _split(cell: Any) -> str:
    if cell not in SPLITS:
        raise BadCell(f"column split is {cell!r}: it must be one of {', '.join(SPLITS)}")
    return cell


def _listed(cell: Any) -> list[Any]:
    """Return a cell's list, also from a csv's text: "[1, 0, 5]" or "1 0 5"."""
    if isinstance(cell, str):
        return re.split(r"[,;\s]+", cell.strip(" []()"))
    if not isinstance(cell, list):
        raise BadCell(f"column votes is {cell!r}: it must be a list of counts, of the ratings 1, 2, …")
    return cell


def _number(cell: Any, column: str) -> float:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadCell(f"column {column} is {cell!r}: it must be a finite number")
    return number


def _of_votes(counts: list[Any], column: str) -> float:
    votes = [_number(count, column) for count in counts]
    if min(votes) < 0 or sum(votes) == 0 or len(votes) < 2:
        raise BadCell(
            f"column {column} is {counts}: it must be counts of 0 or more, of two ratings or more, not all of them 0"
        )
    return mean_rating(votes)
