"""SFT on the round's best images: online supervised fine-tuning, also called expert iteration or best of N."""

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.forward_process import ForwardProcess
from ray_ddpo.learner.algorithms.group_ranks import best_of_groups
from ray_ddpo.learner.algorithms.losses import squared_error
from ray_ddpo.learner.algorithms.selection import MOST_REFILLS, check_refill


class SupervisedFineTuning(ForwardProcess):
    """Supervised fine-tuning with the denoising loss on the best images of each group. The others are not trained on.

    A group whose rewards are equal has no best image, and is left out.
    """

    best: int = Field(default=1, ge=1)
    """Images of each group that are trained on."""
    refill: int = Field(default=0, ge=0, le=MOST_REFILLS)
    """Further samplings of a round, each with as many groups as it lacks because their rewards are all equal."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        check_refill(self.refill, recipe, "algorithm.refill")
        group = recipe.prompts.images_per_prompt
        if group <= self.best:
            raise ValueError(
                f"algorithm.best is {self.best} and prompts.images_per_prompt {group}: sft trains on the best images "
                f"of a group, so a group needs at least {self.best + 1} images"
            )

    @property
    def refill_attempts(self) -> int:
        return self.refill

    @property
    def skips_zero_signals(self) -> bool:
        return True

    def images_learned_from(self, recipe: Recipe) -> float:
        return float(recipe.images_per_round // recipe.prompts.images_per_prompt * self.best)

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return statistics, best_of_groups(rewards, images_per_prompt, self.best)

    def noised_loss(
        self, predicted: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        return squared_error(predicted, target)
