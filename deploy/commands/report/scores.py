"""Scores of the held-out images before and after: by reward and scorer with paired standard errors, and by prompt."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.common.input_images import content_key
from ray_ddpo.common.metrics.statistics import PairedChange, in_errors
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.deploy.commands.report.numbers import tick
from ray_ddpo.deploy.evaluation.categories import change_of_means
from ray_ddpo.deploy.evaluation.eval_result import WEIGHTED_SUM, EvalComparison

PROMPT_ROWS = 300  # of a table
WINDOW = 20  # rounds at either end of a run, at most


@dataclass(frozen=True, kw_only=True)
class Score:
    """Statistics of one reward or scorer over the images that have a score both before and after."""

    name: str
    role: str  # its part in training, in words
    trained_on: bool
    images: int
    before: float  # means
    after: float
    error: float  # standard error of the mean paired difference
    higher: int  # images whose score is higher after
    lower: int
    kept: float | None  # of a scorer of 0 and 1: the share of images with 1 before that have 1 after
    floor: float | None
    below_before: float  # shares of the images below the floor; 0 without a floor
    below_after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def errors(self) -> float | None:
        """Return the change in standard errors; None if every image changed by the same amount."""
        return in_errors(self.change, self.error)

    @property
    def percent(self) -> float | None:
        """Return the change in percent of the value before; None if that was 0."""
        return 100 * self.change / abs(self.before) if self.before else None


def paired(comparison: EvalComparison, name: str) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Return the scores before and after of the images that have both.

    Raises:
        ValueError: fewer than two images have both.
    """
    before, after = comparison.scores_before[name], comparison.scores_after[name]
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < 2:
        raise ValueError(
            f"{name} gave a finite number for {both.sum()} of {len(both)} held-out images both before and after: "
            "a comparison needs at least 2"
        )
    return before[both].astype(np.float64), after[both].astype(np.float64)


def paired_means(comparison: EvalComparison, name: str) -> PairedChange:
    """Compare the means of these images, by the rule of the suite if the evaluation follows one."""
    chosen, scores = comparison.chosen, (comparison.scores_before[name], comparison.scores_after[name])
    found = change_of_means(chosen.suite, chosen.prompts, *scores)
    assert found is not None, "`paired` has refused fewer than two images"
    return found


def share_kept(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> float | None:
    """Return the share of images with score 1 before that have 1 after; None if scores other than 0 and 1 occur."""
    if before.any() and np.isin([before, after], [0, 1]).all():
        return float(after[before == 1].mean())
    return None


def headline(recipe: Recipe) -> str:
    """Return the name of the score that the page is about.

    This is the weighted sum, or the only reward if its weight is 1. If no reward has a weight, it is the first reward.
    """
    rewards = recipe.all_rewards
    alone = len(rewards) == 1 and rewards[0].weight == 1
    return rewards[0].called if alone or not any(table.weight for table in rewards) else WEIGHTED_SUM


def scores(comparison: EvalComparison, recipe: Recipe) -> list[Score]:
    """Return the headline score first, then the other rewards, then the scorers that are not trained on."""
    rewards, aggregation = recipe.all_rewards, recipe.aggregation.kind
    how = "trained on" if aggregation == "sum" else f"training aggregated the rewards by {aggregation!r} instead"
    found = [_score(comparison, WEIGHTED_SUM, f"weighted sum; {how}", True)] if headline(recipe) == WEIGHTED_SUM else []
    for table in rewards:
        floor = "" if table.floor is None else f", floor {tick(table.floor)}"
        found.append(
            _score(comparison, table.called, f"trained on, weight {tick(table.weight)}{floor}", True, table.floor)
        )
    return found + [_score(comparison, table.called, "only looked at", False) for table in recipe.scorers]


def _score(comparison: EvalComparison, name: str, role: str, trained_on: bool, floor: float | None = None) -> Score:
    """Compute the statistics of one score."""
    before, after = paired(comparison, name)
    change = paired_means(comparison, name)
    below = [float((values < floor).mean()) if floor is not None else 0.0 for values in (before, after)]
    return Score(
        name=name,
        role=role,
        trained_on=trained_on,
        images=len(before),
        before=change.before,
        after=change.after,
        error=change.error,
        higher=int((after > before).sum()),
        lower=int((after < before).sum()),
        kept=share_kept(before, after),
        floor=floor,
        below_before=below[0],
        below_after=below[1],
    )


@dataclass(frozen=True)
class PromptRow:
    """The mean reward of one prompt's images at both ends; NaN if there are no images."""

    prompt: str
    images: int
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class PromptTable:
    """The prompts that changed most."""

    rows: list[PromptRow]
    prompts: int  # the number of all prompts
    before: str  # headings of the two columns
    after: str


def held_out_table(comparison: EvalComparison, score: str) -> PromptTable:
    """Group the held-out images by prompt."""
    texts = [prompt.key for prompt in comparison.chosen.prompts]
    before = zip(texts, comparison.scores_before[score], strict=True)
    after = zip(texts, comparison.scores_after[score], strict=True)
    return _table(before, after, "before", "after", images_are_shared=True)


def training_table(ledger: Ledger, score: str) -> PromptTable | None:
    """Group the images trained on in the first and the last rounds by prompt.

    Returns:
        None if the ledger has fewer than two rounds, or the run did not train on this score.
    """
    rounds = ledger.rounds()
    if len(rounds) < 2:
        return None
    window = max(1, min(WINDOW, len(rounds) // 4))
    first, last = rounds[:window], rounds[-window:]
    both = _trained_on(ledger, first, score), _trained_on(ledger, last, score)
    table = _table(*both, _heading(first), _heading(last))
    return table if table.rows else None


def _trained_on(ledger: Ledger, rounds: list[int], score: str) -> Iterable[tuple[str, float]]:
    """Yield prompt and score of every image of these rounds that was not dropped; nothing of another score."""
    name = score if score == WEIGHTED_SUM else f"reward/{score}"
    for round_index in rounds:
        table = ledger.read(round_index, ("prompt", "reward"))
        if name not in table.column_names:
            return
        has_metadata = "metadata" in table.column_names
        metadata = table["metadata"].to_pylist() if has_metadata else [None] * len(table)
        columns = (table["prompt"].to_pylist(), metadata, table["dropped"].to_pylist(), table[name].to_pylist())
        for text, about, reason, reward in zip(*columns, strict=True):
            if reason is None:
                yield content_key(text, json.loads(about or "{}")), reward


def _heading(rounds: list[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}–{rounds[-1]}"


def _table(
    before: Iterable[tuple[str, float]],
    after: Iterable[tuple[str, float]],
    heading_before: str,
    heading_after: str,
    images_are_shared: bool = False,
) -> PromptTable:
    """Average (prompt, score) pairs by prompt, and sort prompts by their change."""
    early, late = _by_prompt(before), _by_prompt(after)
    rows = []
    for prompt in dict.fromkeys([*early, *late]):
        counts = [len(early.get(prompt, ())), len(late.get(prompt, ()))]
        images = max(counts) if images_are_shared else sum(counts)
        rows.append(PromptRow(prompt, images, _mean(early.get(prompt)), _mean(late.get(prompt))))
    rows.sort(key=lambda row: -abs(row.change) if np.isfinite(row.change) else np.inf)
    return PromptTable(rows[:PROMPT_ROWS], len(rows), heading_before, heading_after)


def _by_prompt(scored: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for prompt, reward in scored:
        if np.isfinite(reward):
            found.setdefault(prompt, []).append(float(reward))
    return found


def _mean(values: list[float] | None) -> float:
    return float(np.mean(values)) if values else np.nan
