"""The base of algorithms on finished images, which add noise to them again and need no log-probs or trajectories."""

from abc import ABC

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.losses import sum_of


class ForwardProcess(Algorithm, ABC):
    """A loss on the network's predictions for noised images, guided as in sampling. Any lag is equally valid."""

    noised_samples: int = Field(default=1, ge=1)
    """Noised samples of each image per inner epoch, each at a timestep of its own."""

    @property
    def noised_samples_per_image(self) -> int:
        return self.noised_samples

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch) -> TransitionLoss:
        assert isinstance(batch, NoisedBatch), "this algorithm trains on finished images"
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
        """Return the parts of each sample's loss by name. By default the only part is `noised_loss`.

        Args:
            clean_scale: the change of the implied clean latents per change of the prediction.
        """
        return {"denoising": self.noised_loss(predicted, target, batch)}

    def noised_loss(
        self, predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        """Return the loss of each sample. An algorithm overrides this method or `noised_terms`."""
        raise NotImplementedError(f"{type(self).__name__} has neither noised_loss nor noised_terms")
