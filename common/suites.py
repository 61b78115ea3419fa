"""The suites of published evaluations: prompts, images a prompt, scorers, and the rule of their mean (no torch)."""

from dataclasses import dataclass
from typing import Any, Literal

SuiteName = Literal["ocr", "geneval", "pickscore", "drawbench", "words", "shapes"]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A standard evaluation. Steps, guidance and size are those of the recipe, because they belong to the model."""

    name: str
    about: str
    scorers: tuple[dict[str, Any], ...]  # tables of rewards
    published: str | None = None  # name of the published set whose test prompts are used
    shipped: Literal["words", "shapes"] | None = None
    images_per_prompt: int = 1
    mean_of_categories: bool = False  # or of prompts

    def all_images(self, num_prompts: int) -> int:
        """Return the images of the complete suite."""
        return num_prompts * self.images_per_prompt


_ALL = (
    Suite(
        name="ocr",
        about="Flow-GRPO's test prompts with quoted words (Liu et al. 2025)",
        published="ocr",
        scorers=({"name": "ocr"},),
    ),
    Suite(
        name="geneval",
        about="GenEval (Ghosh et al. 2023): the mean of six categories",
        published="geneval",
        scorers=({"name": "geneval", "measure": "correct"},),
        images_per_prompt=4,
        mean_of_categories=True,
    ),
    Suite(
        name="pickscore",
        about="Flow-GRPO's test prompts of Pick-a-Pic (Liu et al. 2025)",
        published="pickscore",
        scorers=({"name": "pickscore"},),
    ),
    Suite(
        name="drawbench",
        about="DrawBench (Saharia et al. 2022) under several scorers, as Flow-GRPO reports",
        published="drawbench",
        scorers=tuple({"name": name} for name in ("aesthetic", "image_reward", "pickscore", "clip_score", "hps_v2")),
    ),
    Suite(
        name="words",
        about="the words that ship, for a model that writes short words",
        shipped="words",
        scorers=({"name": "ocr"}, {"name": "ocr", "measure": "strict", "label": "ocr_strict"}),
        images_per_prompt=2,
    ),
    Suite(
        name="shapes",
        about="the shapes that ship, for a model that draws coloured shapes",
        shipped="shapes",
        scorers=(
            {"name": "geneval", "detector": "shapes", "measure": "correct"},
            {"name": "geneval", "detector": "shapes", "label": "geneval_soft"},
        ),
        images_per_prompt=4,
        mean_of_categories=True,
    ),
)

SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}
