"""Online Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) on the best and the worst image of each group."""

from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import Column
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.coupled import CoupledForwardProcess
from ray_ddpo.learner.algorithms.group_ranks import best_and_worst
from ray_ddpo.learner.algorithms.preference_losses import ComparedErrors, Coupling, pair_preference
from ray_ddpo.learner.algorithms.selection import MOST_REFILLS, check_refill


class DirectPreferenceOptimization(CoupledForwardProcess):
    """Direct preference optimization: the best image of each group is preferred to the worst.

    A group whose rewards are equal makes no pair, and is left out.
    """

    beta: float = Field(default=2000.0, gt=0)
    """Strength of the pull to the reference, with the factor T, on mean squared errors. flow_grpo uses 100."""
    reference: Literal["pretrained", "behavior"] = "pretrained"
    """Policy that the loss is relative to: the pretrained one, or the one that sampled the round."""

    refill: int = Field(default=0, ge=0, le=MOST_REFILLS)
    """Further samplings of a round, each with as many groups as it lacks because their rewards are all equal."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        check_refill(self.refill, recipe, "algorithm.refill")
        super().check(recipe, policy)

    @property
    def refill_attempts(self) -> int:
        return self.refill

    @property
    def columns(self) -> set[Column]:
        return {"reference_errors"} if self.reference == "pretrained" else {"old_errors"}

    @property
    def skips_zero_signals(self) -> bool:
        return True

    def images_compared(self, images_per_prompt: int) -> int:
        return 2

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return statistics, best_and_worst(rewards, images_per_prompt)

    def couple(self, compared: ComparedErrors) -> Coupling:
        if self.reference == "behavior":
            compared = replace(compared, reference=compared.old)
        return pair_preference(compared, self.beta)
