"""AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739): the reward's gradient, truncated at a random or fixed step."""

from jaxtyping import Float
from torch import Tensor

from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient


class AlignProp(RewardGradient):
    """AlignProp: minimize −reward, or |reward − target|.

    A range of `sampling.backprop_steps` is the random truncation: the number of steps is sampled from the image's seed.
    """

    target: float | None = None
    """Reward that is aimed at: the loss is |reward − target|. By default there is none, and the loss is −reward."""

    def loss_of(self, rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return -rewards if self.target is None else (rewards - self.target).abs()
