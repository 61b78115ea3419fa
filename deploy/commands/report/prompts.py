"""What each prompt's images are worth: held-out ones before and after, training's in the first and the last rounds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ray_ddpo.actors.evaluation.evaluation import Comparison
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.deploy.evaluation.held_out import JOINED

ROWS = 300  # of a table
WINDOW = 20  # rounds at either end of a run, at most


@dataclass(frozen=True)
class PromptRow:
    """One prompt: how many images, and their mean reward at both ends; NaN where there is none."""

    prompt: str
    images: int
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class PromptTable:
    """The prompts that changed most, and how many there are."""

    rows: list[PromptRow]
    prompts: int
    before: str  # what the columns are called
    after: str


def held_out_table(comparison: Comparison, score: str) -> PromptTable:
    """The comparison's images by prompt."""
    texts = [prompt.text for prompt in comparison.chosen.prompts]
    before = zip(texts, comparison.scores_before[score], strict=True)
    after = zip(texts, comparison.scores_after[score], strict=True)
    return _table(before, after, "before", "after", images_are_shared=True)


def training_table(ledger: Ledger, score: str) -> PromptTable | None:
    """What was learned from, by prompt, in as many rounds at either end; None where no rows are kept or one round is all."""
    rounds = ledger.rounds()
    if len(rounds) < 2:
        return None
    window = max(1, min(WINDOW, len(rounds) // 4))
    first, last = rounds[:window], rounds[-window:]
    return _table(
        _learned_from(ledger, first, score), _learned_from(ledger, last, score), _called(first), _called(last)
    )


def _learned_from(ledger: Ledger, rounds: list[int], score: str) -> Iterable[tuple[str, float]]:
    names = ["prompt", "dropped", score if score == JOINED else f"reward/{score}"]
    for round in rounds:
        table = ledger.read(round, ("prompt", "reward"))
        for prompt, reason, reward in zip(*(table[name].to_pylist() for name in names), strict=True):
            if reason is None:
                yield prompt, reward


def _called(rounds: list[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}–{rounds[-1]}"


def _table(
    before: Iterable[tuple[str, float]],
    after: Iterable[tuple[str, float]],
    called_before: str,
    called_after: str,
    images_are_shared: bool = False,
) -> PromptTable:
    early, late = _by_prompt(before), _by_prompt(after)
    rows = []
    for prompt in dict.fromkeys([*early, *late]):
        counts = [len(early.get(prompt, ())), len(late.get(prompt, ()))]
        images = max(counts) if images_are_shared else sum(counts)
        rows.append(PromptRow(prompt, images, _mean(early.get(prompt)), _mean(late.get(prompt))))
    rows.sort(key=lambda row: -abs(row.change) if np.isfinite(row.change) else np.inf)
    return PromptTable(rows[:ROWS], len(rows), called_before, called_after)


def _by_prompt(scored: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for prompt, reward in scored:
        if np.isfinite(reward):
            found.setdefault(prompt, []).append(float(reward))
    return found


def _mean(values: list[float] | None) -> float:
    return float(np.mean(values)) if values else np.nan
