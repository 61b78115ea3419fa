"""DRaFT-LV (Clark et al. 2023, arXiv 2309.17400): the last step's gradient with lower variance, by more noise."""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.denoising_gradient import steps_of
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient


class DRaFTLowVariance(RewardGradient):
    """DRaFT-LV: DRaFT-1, averaged with the gradients of the finished image that was noised to the last step again."""

    noised_samples: int = Field(default=2, ge=1)
    """Noised versions of each finished image, beside the sampled last step."""

    @property
    def restarts_per_image(self) -> int:
        return 1 + self.noised_samples

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        super().check(recipe, policy)
        if recipe.sampling.backprop_steps != 1:
            raise ValueError(
                f"algorithm.name is {recipe.algorithm.name!r} and sampling.backprop_steps {recipe.sampling.backprop_steps}: "
                "noised images are denoised by the last step alone, so give 1; more steps are draft"
            )

    def load(self, policy: Policy, config: PolicyConfig) -> Base:
        """Load the decoder and the rewards. ValueError: the policy does not tell its noise levels."""
        steps_of(policy, "algorithm.name is 'draft_lv'")
        return super().load(policy, config)

    def loss_of(self, rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return -rewards
