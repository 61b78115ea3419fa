"""The base of algorithms on finished images, which add noise to them again and need no log-probs or trajectories."""

from abc import ABC

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ray_ddpo.common.base_parts import Base
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
from ray_ddpo.learner.algorithms.losses import sum_of


class ForwardProcess(Algorithm, ABC):
    """A loss on the network's predictions for noised images, guided as in sampling by default. Any lag is equally valid."""

    noised_samples: int = Field(default=1, ge=1)
    """Noised samples of each image per inner epoch, each at a timestep of its own."""
    guided: bool = True
    """Train on the guided prediction, as images are sampled. If false, on the prediction for the prompt alone."""

    @property
    def guides_denoising(self) -> bool:
        return self.guided

    def load(self, policy: Policy, config: PolicyConfig) -> Base:
        policy.guides_denoising = self.guided
        return super().load(policy, config)

    @property
    def noised_samples_per_image(self) -> int:
        return self.noised_samples

    def compute_loss(self, policy: Policy, batch: TransitionBatch | NoisedBatch | RestartBatch) -> TransitionLoss:
        assert isinstance(batch, NoisedBatch), "this algorithm trains on finished images"
        predicted, target = policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)
        return self.noised_result(predicted, target, policy.clean_scale(batch.timesteps), batch)

    def noised_result(
        self,
        predicted: Float[Tensor, "B C *S"],
        target: Float[Tensor, "B C *S"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> TransitionLoss:
        """Return the loss of each sample with its diagnostics. By default the sum of `noised_terms`, and none."""
        terms = self.noised_terms(predicted, target, clean_scale, batch)
        return TransitionLoss(sum_of(terms), terms=terms)

    def noised_terms(
        self,
        predicted: Float[Tensor, "B C *S"],
        target: Float[Tensor, "B C *S"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> dict[str, Float[Tensor, "B"]]:
        """Return the parts of each sample's loss by name. By default the only part is `noised_loss`.

        Args:
            clean_scale: the change of the implied clean latents per change of the prediction.
        """
        return {"denoising": self.noised_loss(predicted, target, batch)}

    def noised_loss(
        self, predicted: Float[Tensor, "B C *S"], target: Float[Tensor, "B C *S"], batch: NoisedBatch
    ) -> Float[Tensor, "B"]:
        """Return the loss of each sample. An algorithm overrides this method, `noised_terms` or `noised_result`."""
        raise NotImplementedError(f"{type(self).__name__} has neither noised_loss nor noised_terms")


class AveragedSampling(ForwardProcess, ABC):
    """A loss on noised samples whose samplers may use a moving average of the trained weights.

    The average's decay grows with the policy version: min(ema_decay_max, ema_decay_growth · (version −
    ema_decay_flat)), and is 0 before that version. Without growth there is no average.
    """

    ema_decay_growth: float = Field(default=0.0, ge=0)
    """Increase of the moving average's decay per policy version. 0: samplers use the trained weights."""
    ema_decay_max: float = Field(default=0.5, ge=0, lt=1)
    """Largest decay of the moving average."""
    ema_decay_flat: int = Field(default=0, ge=0)
    """Policy versions before which the decay is 0."""

    @model_validator(mode="after")
    def _an_average_grows(self) -> "AveragedSampling":
        """Refuse settings of a moving average beside no growth, with which there is no average."""
        for key in ("ema_decay_max", "ema_decay_flat"):
            if not self.ema_decay_growth and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)} and ema_decay_growth 0, with which samplers use the trained weights: "
                    "give ema_decay_growth, or leave the key out"
                )
        return self

    def ema_decay(self, policy_version: int) -> float | None:
        if not self.ema_decay_growth:
            return None
        return min(self.ema_decay_max, self.ema_decay_growth * max(0, policy_version - self.ema_decay_flat))


class WeightedMatching(AveragedSampling, ABC):
    """A loss on noised samples that is weighted by each image's advantage."""

    advantages: AdvantageSettings = AdvantageSettings(kind="group", group_deviation="round")
    """Computation of advantages from rewards."""
    shared_noise: bool = False
    """Add the same noise at the same timesteps to all images of a group, instead of to each its own. Advantages of a
    group sum to 0, so most of the noise in its gradient cancels."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        self.advantages.check(recipe)
        if self.shared_noise and recipe.prompts.images_per_prompt < 2:
            raise ValueError(
                "algorithm.shared_noise is true, and prompts.images_per_prompt is 1, so that no images share noise: give "
                "at least 2, or leave the key out"
            )

    @property
    def shares_noise(self) -> bool:
        return self.shared_noise

    def compute_advantages(
        self, statistics: PromptStatistics, prompts: list[str], rewards: Float[np.ndarray, "N"], images_per_prompt: int
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"]]:
        return self.advantages.advantages(statistics, prompts, rewards, images_per_prompt)
