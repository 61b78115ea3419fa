"""What algorithms on finished images share: they are noised again, so neither log-probs nor the path that led there count."""

from abc import ABC

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.losses import sum_of


class ForwardProcess(Algorithm, ABC):
    """A loss on what the network, guided as it samples, predicts of noised images; so any lag is as good as none."""

    noised_samples: int = Field(default=1, ge=1)
    """Noised samples of each image per inner epoch, each at a timestep of its own."""

    @property
    def noised_samples_per_image(self) -> int:
        return self.noised_samples

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        assert isinstance(batch, NoisedBatch), "finished images are learned from"
        predicted, target = policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)
        terms = self.noised_terms(predicted, target, policy.clean_scale(batch.timesteps), batch)
        return TransitionLoss(sum_of(terms), terms=terms)

    def noised_terms(
        self,
        predicted: Float[Tensor, "B C H W"],
        target: Float[Tensor, "B C H W"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> dict[str, Float[Tensor, "B"]]:
        """The parts of each pair's loss by name; one part, unless an algorithm has several.

        `clean_scale`: by how much the clean latents that a prediction stands for move with it.
        """
        return {"denoising": self.noised_loss(predicted, target, batch)}

    def noised_loss(
        self, predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        """The loss of each pair, from what the network predicts and what it should. An algorithm has this or `noised_terms`."""
        raise NotImplementedError(f"{type(self).__name__} has neither noised_loss nor noised_terms")
