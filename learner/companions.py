"""Companions: what a learner keeps and learns beside the policy: a reference that moves, and a value function."""

from dataclasses import replace
from typing import final

import numpy as np
import torch

from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.held_weights import WeightsHolder
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.transitions import RoundTransitions
from ray_ddpo.learner.temporary_weights import HeldWeights
from ray_ddpo.learner.value_function import ValueFunction


@final
class Companions:
    """The reference and the value function of an algorithm, if it has them. Every rank has the same."""

    def __init__(self, algorithm: Algorithm, policy: Policy, recipe: Recipe, process_group: ProcessGroup) -> None:
        self._algorithm = algorithm
        self._process_group = process_group
        self._latent_elements = int(torch.Size(policy.latent_shape).numel())
        settings = algorithm.value_settings
        self._value: ValueFunction | None = None
        if settings is not None:
            self._value = ValueFunction(settings, policy.num_steps, recipe.seed, policy.device)
        self._metrics: dict[str, float] = {}
        self.reference: HeldWeights | None = None  # None: the pretrained model

    def with_baselines(self, batch: TrainBatch, transitions: RoundTransitions) -> RoundTransitions:
        """Let the value function learn from a round, or from its part, and return the transitions with its values.

        Raises:
            RuntimeError: the ranks' value functions differ.
        """
        if self._value is None:
            return transitions
        trained = np.isfinite(batch.advantages)
        if self._algorithm.skips_zero_signals:  # the advantage of an image that is left out was replaced by 0
            trained &= batch.advantages != 0
        images = torch.from_numpy(np.flatnonzero(trained))
        values, self._metrics = self._value.learn(transitions, images, (batch.round, batch.part))
        self._process_group.check_equal(self._value.parameters())
        return replace(transitions, baselines=values)

    def end_round(self, metrics: dict[str, float], trained: HeldWeights) -> dict[str, float]:
        """Return a round's metrics with those of the companions. The trained weights may become the reference."""
        kl, last = metrics.get("kl_moving_reference_nats"), self.reference
        if kl is not None:
            since = trained.policy_version - (0 if last is None else last.policy_version)
            resets = self._algorithm.resets_reference(kl / self._latent_elements, since)
            # All ranks reset the reference or none, even if their machines round differently.
            if self._process_group.all_reduce_max(resets) > 0:
                self.reference = trained
            metrics = {**metrics, "reference_version": float(0 if last is None else last.policy_version)}
        metrics, self._metrics = {**metrics, **self._metrics}, {}
        return metrics

    def state(self, state: LearnerState, holder: WeightsHolder, first: bool) -> LearnerState:
        """Return a state with the companions' added. A collective if weights are sharded."""
        reference = None if self.reference is None else holder.whole(self.reference, first)
        return replace(state, reference=reference, value={} if self._value is None else self._value.arrays())

    def load(self, state: LearnerState, holder: WeightsHolder) -> None:
        """Continue from a state. ValueError: its value function is another one."""
        self.reference = None if state.reference is None else holder.held(state.reference)
        if self._value is not None:
            self._value.load(state.value)
