"""DRaFT-K (Clark et al. 2023, arXiv 2309.17400): the reward's gradient through the last K denoising steps."""

from jaxtyping import Float
from torch import Tensor

from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient


class DRaFT(RewardGradient):
    """DRaFT-K: minimize −reward. `sampling.backprop_steps` is K; all steps give the full backpropagation, DRaFT."""

    def loss_of(self, rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return -rewards
