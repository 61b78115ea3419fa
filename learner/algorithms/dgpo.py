"""DGPO (Luo et al. 2025, arXiv 2510.08425): direct group preference optimization with advantages as weights."""

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import Column, NoisedBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.coupled import CoupledForwardProcess
from ray_ddpo.learner.algorithms.losses import squared_error
from ray_ddpo.learner.algorithms.preference_losses import ComparedErrors, Coupling, group_preference


class DirectGroupPreferenceOptimization(CoupledForwardProcess):
    """Direct group preference optimization: images above their group's mean are preferred to those below."""

    advantages: AdvantageSettings = AdvantageSettings(kind="group")
    """Computation of advantages from rewards. They must be centered within groups."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Absolute value at which advantages are clipped."""
    beta: float = Field(default=100.0, gt=0)
    """Strength of the preference inside the sigmoid, on mean squared errors. The authors use 100 and 10."""
    clip_range: float = Field(default=0.01, gt=0)
    """Clip range of exp(e_old − e), with the denoising error e: an image outside has no gradient. 1000: never."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of mean ‖v − v_pretrained‖². The authors use 0.02 and 0.001."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        if self.advantages.kind != "group":
            raise ValueError(
                f"algorithm.advantages.kind is {self.advantages.kind!r}: dgpo compares the images of a group, so its "
                "advantages must be centered within groups; give 'group'"
            )
        floors = [table.called for table in recipe.all_rewards if table.floor is not None]
        if recipe.aggregation.kind == "advantages" and floors:
            raise ValueError(
                f"aggregation.kind is 'advantages', the reward {floors[0]} has a floor, and the algorithm is dgpo: floors "
                "move the sums of advantages, and dgpo needs them centered within groups; give another aggregation or no "
                "floor"
            )
        super().check(recipe, policy)

    @property
    def columns(self) -> set[Column]:
        wanted: dict[Column, bool] = {
            "reference_errors": True,
            "old_errors": True,
            "reference_predictions": self.kl_coef > 0,
        }
        return {name for name, is_wanted in wanted.items() if is_wanted}

    @property
    def clips(self) -> bool:
        return True

    def images_compared(self, images_per_prompt: int) -> int:
        return images_per_prompt

    def from_advantages(self, advantages: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        return advantages.clip(-self.advantage_clip, self.advantage_clip)

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return self.advantages.advantages(statistics, prompts, rewards, images_per_prompt)

    def couple(self, compared: ComparedErrors) -> Coupling:
        return group_preference(compared, self.beta, self.clip_range)

    def other_terms(
        self, predicted: Float[Tensor, "B C *S"], clipped: Float[Tensor, "B"], batch: NoisedBatch
    ) -> dict[str, Float[Tensor, "B"]]:
        if batch.reference_predictions is None:
            return {}
        return {"kl": self.kl_coef * squared_error(predicted, batch.reference_predictions)}
