"""The base of losses on noised samples that compare the images of a group with each other."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import NoisedBatch
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.forward_process import AveragedSampling
from ray_ddpo.learner.algorithms.losses import squared_error, sum_of
from ray_ddpo.learner.algorithms.preference_losses import ComparedErrors, Coupling


class CoupledForwardProcess(AveragedSampling, ABC):
    """A loss that is a function of the denoising errors of all images of a group, which share noise and timestep.

    The learner puts complete groups into an optimizer step. The derivative of the loss in each row's error comes from
    the errors of the complete group under the weights at the start of that step. A row's own loss is this slope times
    its error, so rows may be in different micro-batches and ranks.
    """

    @property
    def compares_groups(self) -> bool:
        return True

    @abstractmethod
    def images_compared(self, images_per_prompt: int) -> int:
        """Return how many images of a group enter its loss."""

    @abstractmethod
    def couple(self, compared: ComparedErrors) -> Coupling:
        """Return loss and slope of each row of complete groups."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        group, step = recipe.prompts.images_per_prompt, recipe.learner.images_per_step
        if group < 2:
            raise ValueError(
                f"algorithm {recipe.algorithm.name!r} compares the images of a group, and prompts.images_per_prompt is "
                f"{group}: give at least 2"
            )
        if step % self.images_compared(group):
            raise ValueError(
                f"an optimizer step has {step} images (learner.batch_size × gradient_accumulation_steps), and "
                f"algorithm {recipe.algorithm.name!r} compares {self.images_compared(group)} images of a group: give a multiple "
                "of that"
            )

    @property
    def clips(self) -> bool:
        """Return whether slopes of rows may be set to 0, which the metrics then count."""
        return False

    def images_learned_from(self, recipe: Recipe) -> float:
        group = recipe.prompts.images_per_prompt
        return float(recipe.images_per_round // group * self.images_compared(group))

    def coupling(
        self,
        errors: Float[Tensor, "B"],
        reference: Float[Tensor, "B"] | None,
        old: Float[Tensor, "B"] | None,
        signals: Float[Tensor, "B"],
        groups: Int[Tensor, "B"],
    ) -> Float[Tensor, "B 4"]:
        """Return loss, slope, agreement and clipping of each row, from the errors of complete groups.

        Args:
            reference: None: as `errors`.
            old: None: as `errors`.
            groups: the set that each row belongs to. The rows of a set are neighbors.
        """
        (size,) = set(torch.unique_consecutive(groups, return_counts=True)[1].tolist())
        columns = (errors, errors if reference is None else reference, errors if old is None else old, signals)
        rows = [column.double().view(-1, size) for column in columns]
        found = self.couple(ComparedErrors(errors=rows[0], reference=rows[1], old=rows[2], signals=rows[3]))
        return torch.stack([found.loss, found.slopes, found.agrees, found.clipped], -1).flatten(0, 1)

    def noised_result(
        self,
        predicted: Float[Tensor, "B C *S"],
        target: Float[Tensor, "B C *S"],
        clean_scale: Float[Tensor, "B"],
        batch: NoisedBatch,
    ) -> TransitionLoss:
        errors = squared_error(predicted, target)
        coupling = batch.coupling
        if coupling is None:  # the batch has complete groups
            assert batch.groups is not None, "the learner numbers the groups of an algorithm that compares them"
            columns = (errors.detach(), batch.reference_errors, batch.old_errors, batch.weights, batch.groups)
            coupling = self.coupling(*columns)
        value, slope, agrees, clipped = coupling.to(errors.dtype).unbind(1)
        terms = {"preference": value + slope * (errors - errors.detach())}
        terms |= self.other_terms(predicted, clipped, batch)
        return TransitionLoss(sum_of(terms), clipped=clipped if self.clips else None, agrees=agrees, terms=terms)

    def other_terms(
        self, predicted: Float[Tensor, "B C *S"], clipped: Float[Tensor, "B"], batch: NoisedBatch
    ) -> dict[str, Float[Tensor, "B"]]:
        """Return further parts of each row's loss, which are not coupled. By default none."""
        return {}
