"""ReFL (Xu et al. 2023, arXiv 2304.05977): the reward's gradient through one prediction of the clean image."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import RestartBatch
from ray_ddpo.learner.algorithms.denoising_gradient import prediction_shift, pretrained_prediction, recomputed, steps_of
from ray_ddpo.learner.algorithms.reward_gradient import RewardGradient


class ReFL(RewardGradient):
    """ReFL: minimize ReLU(margin − reward) of the clean image that one forward pass predicts from stored latents.

    A range of `sampling.backprop_steps` samples the step from the image's seed: [1, 10] are the last ten.
    """

    margin: float = 2.0
    """Reward from which on an image has no loss. By default that of the authors for ImageReward."""
    loss_scale: float = Field(default=1e-3, gt=0)
    """Factor of the loss. By default that of the authors. With Adam it matters beside `learner.max_grad_norm` only."""

    def load(self, policy: Policy, config: PolicyConfig) -> Base:
        """Load the decoder and the rewards. ValueError: the policy does not tell its noise levels."""
        steps_of(policy, "algorithm.name is 'refl'")
        return super().load(policy, config)

    @property
    def most_passes(self) -> int:
        return 1

    def passes_per_transition(self, recipe: Recipe) -> float:
        return 1.0

    def denoised(
        self, policy: Policy, batch: RestartBatch
    ) -> tuple[Float[Tensor, "B C *S"], Float[Tensor, "B"] | None]:
        """Return the clean latents that the network predicts at each row's own step (algorithm 1 of the paper)."""
        table, steps = (
            steps_of(policy, "algorithm.name is 'refl'"),
            torch.tensor(batch.starts, device=batch.latents.device),
        )
        latents, reference = batch.latents.float(), None
        if self.compared_steps(policy) is not None:
            reference = pretrained_prediction(policy, table, latents, steps, batch.conditioning)

        def predict(latents: Tensor) -> tuple[Tensor, Tensor | None]:
            predicted = policy.predict(latents, table.timesteps[steps], batch.conditioning)
            shift = None if reference is None else prediction_shift(predicted, reference)
            return table.clean(latents, predicted, steps), shift

        return recomputed(predict, latents) if self.recompute else predict(latents)

    def remark(self, round_index: int, metrics: Mapping[str, float]) -> str | None:
        """Say that no image has a loss, if that is so."""
        smallest = metrics.get("learner/reward_min", -math.inf)
        if not smallest >= self.margin:
            return None
        return (
            f"algorithm.margin = {self.margin:g} is at or below the reward of every image of round {round_index + 1}, the "
            f"smallest of which is {smallest:.4g}: no image has a loss, and nothing was learned; give a larger margin"
        )

    def loss_of(self, rewards: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return torch.relu(self.margin - rewards)
