"""What algorithms on finished images share: they are noised anew, so neither log-probs nor the path that led there count."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from common.diffusion.policy import Policy
from common.trajectory import NoisedBatch, TransitionBatch
from learner.algorithms.algorithm import Algorithm, PairLoss


class ForwardProcess(Algorithm, ABC):
    """A loss on what the network, guided as it samples, predicts of noised images; so any lag is as good as none."""

    noisings: int = Field(default=1, ge=1)  # of each image in an inner epoch, each to a timestep of its own

    @property
    def noisings_per_image(self) -> int:
        return self.noisings

    def pair_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> PairLoss:
        assert isinstance(batch, NoisedBatch), "finished images are learned from"
        predicted, target = policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)
        return PairLoss(self.noised_loss(predicted, target, batch))

    @abstractmethod
    def noised_loss(
        self, predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        """The loss of each pair, from what the network predicts and what it should."""
