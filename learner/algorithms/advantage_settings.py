"""Settings of advantages: the keys of `[algorithm.advantages]`."""

from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import Component
from ray_ddpo.learner.algorithms.advantages import (
    PromptStatistics,
    extend_statistics,
    group_advantages,
    per_prompt_advantages,
    round_advantages,
)


class AdvantageSettings(Component):
    """Baseline and scale of advantages: running statistics per prompt, the whole round, or a group (GRPO)."""

    kind: Literal["per_prompt", "round", "group"] = "per_prompt"
    """Rewards that an image is compared with: the prompt's last ones, the round's, or its group's."""
    buffer_size: int = Field(default=32, ge=1)
    """Last rewards of each prompt that `per_prompt` keeps."""
    min_count: int = Field(default=16, ge=1)
    """Rewards of a prompt below which `per_prompt` uses the mean and deviation of the whole round."""
    group_deviation: Literal["group", "round", "none"] = "group"
    """Standard deviation that `group` divides by: the group's own, the round's, or none (GARDO; Dr. GRPO)."""

    @model_validator(mode="after")
    def _buffer_holds_min_count(self) -> "AdvantageSettings":
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count {self.min_count} is above buffer_size {self.buffer_size}: it would never be reached"
            )
        return self

    def check(self, recipe: Recipe) -> None:
        """Check the settings against the rest of the recipe.

        Raises:
            ValueError: advantages are computed within groups, and a group has one image.
        """
        if self.kind == "group" and recipe.prompts.images_per_prompt < 2:
            raise ValueError(
                "algorithm.advantages.kind is 'group' and prompts.images_per_prompt "
                f"{recipe.prompts.images_per_prompt}: "
                "a group needs at least 2 images of one prompt"
            )

    def advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        """Return the statistics with this round added, and each image's advantage."""
        if self.kind == "round":
            return statistics, round_advantages(rewards)
        if self.kind == "group":
            return statistics, group_advantages(rewards, images_per_prompt, self.group_deviation)
        statistics = extend_statistics(statistics, prompts, rewards, self.buffer_size)
        return statistics, per_prompt_advantages(statistics, prompts, rewards, self.min_count)
