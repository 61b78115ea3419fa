"""Means by category with confidence intervals, and paired changes; images of one prompt are not independent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.metrics.statistics import PairedChange, paired_change, rows_by_name
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.suites import Suite

CATEGORY = "tag"  # the key of a prompt's metadata, as in GenEval
TOTAL = "suite"  # the row of a complete suite, in tables
Z95 = 1.959964  # of the normal distribution: 95 % lie within so many standard errors


@dataclass(frozen=True)
class CategoryMean:
    """Mean score of a category, or of a whole suite."""

    prompts: int
    images: int
    mean: float
    standard_error: float | None  # None if there is one prompt

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval."""
        if self.standard_error is None:
            return None
        return self.mean - Z95 * self.standard_error, self.mean + Z95 * self.standard_error

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval_95": self.interval}


def category(prompt: Prompt) -> str:
    """Return the category of a prompt; `all` if it has none, or null in a file."""
    value = prompt.metadata.get(CATEGORY)
    return "all" if value is None else str(value)


def suite_means(
    suite: Suite, prompts: Sequence[Prompt], scores: Float[np.ndarray, "N"]
) -> tuple[CategoryMean, dict[str, CategoryMean]]:
    """Return a suite's mean by its rule, and that of each category. `scores` are NaN where an image has none."""
    names, keys = [category(prompt) for prompt in prompts], [prompt.key for prompt in prompts]
    # float64, so that means of differences are differences of means.
    return category_means(names, keys, scores.astype(np.float64), suite.mean_of_categories)


def finite_mean(values: Float[np.ndarray, "N"]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def mean_score(suite: Suite | None, prompts: Sequence[Prompt], scores: Float[np.ndarray, "N"]) -> float:
    """Return the mean by the rule of the suite, or over the images if there is no suite; NaN without any score."""
    return suite_means(suite, prompts, scores)[0].mean if suite else finite_mean(scores)


def change_of_means(
    suite: Suite | None,
    prompts: Sequence[Prompt],
    before: Float[np.ndarray, "N"],
    after: Float[np.ndarray, "N"],
) -> PairedChange | None:
    """Compare two results of the same images: by the suite's rule, or over the images if there is no suite.

    Returns:
        None if fewer than two images have a score both times. The error is NaN if a category has one image.
    """
    found = paired_change(before, after)
    if suite is None or found is None:
        return found
    both = np.isfinite(before) & np.isfinite(after)
    old, new = (np.where(both, values, np.nan).astype(np.float64) for values in (before, after))
    error = suite_means(suite, prompts, new - old)[0].standard_error
    means = {"before": mean_score(suite, prompts, old), "after": mean_score(suite, prompts, new)}
    return replace(found, **means, error=np.nan if error is None else error)


def means_by_category(prompts: Sequence[Prompt], scores: Float[np.ndarray, "N"]) -> dict[str, float]:
    """Return the mean of each category, in order of appearance. It is empty if no prompt has a category."""
    if not any(CATEGORY in prompt.metadata for prompt in prompts):
        return {}
    names, keys = [category(prompt) for prompt in prompts], [prompt.key for prompt in prompts]
    return {name: found.mean for name, found in category_means(names, keys, scores, False)[1].items()}


def category_means(
    categories: Sequence[str], prompts: Sequence[str], scores: Float[np.ndarray, "N"], mean_of_categories: bool
) -> tuple[CategoryMean, dict[str, CategoryMean]]:
    """Return the mean of the suite, and of each category in order of appearance.

    A prompt's images are averaged first. The standard error is that of these means, because images of one prompt are
    alike. Images without a score are left out. A category of one prompt adds the standard error of its images.

    Args:
        categories: of each image.
        prompts: of each image, as their keys.
        scores: of each image; NaN if it has none.
        mean_of_categories: the suite's mean is that of its categories; else that of its prompts.
    """
    scored = [row for row, score in enumerate(scores) if np.isfinite(score)]
    found, errors = {}, []
    for name, rows in rows_by_name([categories[row] for row in scored]).items():
        own = [scored[int(row)] for row in rows]
        found[name] = _clustered([prompts[row] for row in own], scores[own])
        # A single prompt says nothing of other prompts, and its images still vary with their noise.
        clusters = [str(row) for row in own] if found[name].prompts == 1 else [prompts[row] for row in own]
        errors.append(_clustered(clusters, scores[own]).standard_error)
    if not mean_of_categories or not found:
        # One prompt may be in two categories, so its category is part of its name.
        named = [f"{categories[row]}\0{prompts[row]}" for row in scored]
        return _clustered(named, scores[scored]), found
    known = [error for error in errors if error is not None]
    error = float(np.sqrt(np.sum(np.square(known))) / len(errors)) if len(known) == len(errors) else None
    counts = (sum(each.prompts for each in found.values()), len(scored))
    return CategoryMean(*counts, float(np.mean([each.mean for each in found.values()])), error), found


def _clustered(prompts: Sequence[str], scores: Float[np.ndarray, "n"]) -> CategoryMean:
    """Return the mean over prompts, each the mean of its images, and its standard error."""
    means = np.array([scores[rows].mean() for rows in rows_by_name(prompts).values()])
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return CategoryMean(len(means), len(scores), float(means.mean()) if len(means) else float("nan"), error)


def best_of(means: dict[str, dict[str, CategoryMean]]) -> dict[str, str]:
    """Return, for each category, the weights with the highest mean; the first of equal ones, none if all are equal."""
    best = {}
    for name in dict.fromkeys(name for of_weights in means.values() for name in of_weights):
        of_category = {location: row[name].mean for location, row in means.items() if name in row}
        if len(of_category) == 1 or len(set(of_category.values())) > 1:
            best[name] = max(of_category, key=of_category.__getitem__)
    return best
