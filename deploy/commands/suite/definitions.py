"""The suites: prompts, images a prompt, scorers, and how categories are averaged."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ddpo.common.prompt_set import PromptSet, SetName
from ray_ddpo.common.prompts import File, Prompt, PromptSource


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A standard evaluation. Steps, guidance and size are those of the recipe, because they belong to the model."""

    about: str
    scorers: tuple[dict[str, Any], ...]  # tables of rewards
    published: str | None = None  # name of the published set whose test prompts are used
    shipped: SetName | None = None
    images_per_prompt: int = 1
    mean_of_categories: bool = False  # or of prompts

    def prompts(self, name: str, folder: Path) -> PromptSource:
        """Return the source of the suite's prompts.

        Raises:
            ValueError: the published prompts were not fetched into `folder`.
        """
        if self.shipped is not None:
            return PromptSet(set=self.shipped)
        path = folder / f"{self.published}_test.jsonl"
        if not path.is_file():
            raise ValueError(
                f"the suite {name} needs {path}, which is not there: fetch it with ddpo prompts {self.published} "
                f"--output {folder}, or say with --prompts-from where it is"
            )
        return File(path=str(path))


SUITES: dict[str, Suite] = {
    "ocr": Suite(
        about="Flow-GRPO's test prompts with quoted words (Liu et al. 2025)",
        published="ocr",
        scorers=({"name": "ocr"},),
    ),
    "geneval": Suite(
        about="GenEval (Ghosh et al. 2023): the mean of six categories",
        published="geneval",
        scorers=({"name": "geneval", "measure": "correct"},),
        images_per_prompt=4,
        mean_of_categories=True,
    ),
    "pickscore": Suite(
        about="Flow-GRPO's test prompts of Pick-a-Pic (Liu et al. 2025)",
        published="pickscore",
        scorers=({"name": "pickscore"},),
    ),
    "drawbench": Suite(
        about="DrawBench (Saharia et al. 2022) under several scorers, as Flow-GRPO reports",
        published="drawbench",
        scorers=tuple({"name": name} for name in ("aesthetic", "image_reward", "pickscore", "clip_score", "hps_v2")),
    ),
    "words": Suite(
        about="the words that ship, for a model that writes short words",
        shipped="words",
        scorers=({"name": "ocr"}, {"name": "ocr", "measure": "strict", "label": "ocr_strict"}),
        images_per_prompt=2,
    ),
    "shapes": Suite(
        about="the shapes that ship, for a model that draws coloured shapes",
        shipped="shapes",
        scorers=(
            {"name": "geneval", "detector": "shapes", "measure": "correct"},
            {"name": "geneval", "detector": "shapes", "label": "geneval_soft"},
        ),
        images_per_prompt=4,
        mean_of_categories=True,
    ),
}


def suite_named(name: str) -> Suite:
    """Return a suite. Raise ValueError if there is none of this name."""
    if name not in SUITES:
        raise ValueError(f"--suite is {name!r}: it must be one of {list(SUITES)}")
    return SUITES[name]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts and metadata: results of other prompts cannot be compared."""
    told = [[prompt.text, prompt.metadata] for prompt in prompts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
