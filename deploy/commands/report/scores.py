"""What every reward and scorer says of the held-out images, before and after, with paired standard errors."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.common.metrics.statistics import in_errors, paired_error
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.report.numbers import tick
from ray_ddpo.deploy.evaluation.held_out import JOINED


@dataclass(frozen=True)
class Score:
    """One reward's or scorer's figures over the images that it could score both times."""

    name: str
    role: str  # what part it had in training
    trained_on: bool
    images: int
    before: float  # means
    after: float
    error: float  # standard error of the mean paired difference
    higher: int  # images whose score is higher after
    lower: int
    kept: float | None  # of a yes-or-no scorer: the share of those with 1 before that have 1 after
    floor: float | None
    below_before: float  # shares below the floor; 0 without one
    below_after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def errors(self) -> float | None:
        """The change in standard errors; None where every image changed alike."""
        return in_errors(self.change, self.error)

    @property
    def percent(self) -> float | None:
        """The change in percent of what it was; None where that was 0."""
        return 100 * self.change / abs(self.before) if self.before else None


def paired(comparison: Comparison, name: str) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Scores before and after of the images that could be scored both times. ValueError: there are not two."""
    before, after = comparison.scores_before[name], comparison.scores_after[name]
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < 2:
        raise ValueError(
            f"{name} gave a finite number for {both.sum()} of {len(both)} held-out images both before and after: "
            "a comparison needs at least 2"
        )
    return before[both].astype(np.float64), after[both].astype(np.float64)


def share_kept(before: Float[np.ndarray, "N"], after: Float[np.ndarray, "N"]) -> float | None:
    """Of a scorer that says 0 or 1: the share of those with 1 before that still have it; None of any other scorer."""
    if before.any() and np.isin([before, after], [0, 1]).all():
        return float(after[before == 1].mean())
    return None


def headline(recipe: Recipe) -> str:
    """The score that the page is about: the weighted sum, or the one reward that it is; without weights, the first reward."""
    rewards = recipe.all_rewards
    alone = len(rewards) == 1 and rewards[0].weight == 1
    return rewards[0].called if alone or not any(table.weight for table in rewards) else JOINED


def scores(comparison: Comparison, recipe: Recipe) -> list[Score]:
    """The headline's first, then the other rewards', then those of the scorers that were only looked at."""
    rewards, join = recipe.all_rewards, recipe.aggregation.kind
    how = "trained on" if join == "sum" else f"training joined the rewards by {join!r} instead"
    found = [_score(comparison, JOINED, f"weighted sum; {how}", True)] if headline(recipe) == JOINED else []
    for table in rewards:
        floor = "" if table.floor is None else f", floor {tick(table.floor)}"
        found.append(
            _score(comparison, table.called, f"trained on, weight {tick(table.weight)}{floor}", True, table.floor)
        )
    return found + [_score(comparison, table.called, "only looked at", False) for table in recipe.evaluation.scorers]


def _score(comparison: Comparison, name: str, role: str, trained_on: bool, floor: float | None = None) -> Score:
    before, after = paired(comparison, name)
    below = [float((values < floor).mean()) if floor is not None else 0.0 for values in (before, after)]
    return Score(
        name=name,
        role=role,
        trained_on=trained_on,
        images=len(before),
        before=float(before.mean()),
        after=float(after.mean()),
        error=paired_error(before, after),
        higher=int((after > before).sum()),
        lower=int((after < before).sum()),
        kept=share_kept(before, after),
        floor=floor,
        below_before=below[0],
        below_after=below[1],
    )
