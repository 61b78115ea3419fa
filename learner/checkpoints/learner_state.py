"""LearnerState: all that the learner needs to go on to the last bit; and what evaluation needs beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights


@dataclass(frozen=True)
class LearnerState:
    """The published weights, those that are trained, the optimizer's moments, and the gradient scaler."""

    policy_version: int
    weights: tuple[PolicyWeights, ...]  # published: of the last max_policy_lag + 1 versions, the newest last
    optimizer: dict[str, np.ndarray]  # "<parameter>/<AdamW's own key>"; of a rank that divides them, its own
    scaler: dict[str, int | float]  # of float16's gradient scaler; empty otherwise
    own_weights: PolicyWeights | None = (
        None  # those that are trained, where samplers sample with an average of versions
    )
    micro_batch_size: int | None = None  # that it learns with, for it decides the last bits; none: not known
    machine: Machine | None = None  # that it was learned on; none: not known

    @property
    def trained(self) -> PolicyWeights:
        """The weights that are trained; they are the newest published ones, unless those are an average."""
        return self.own_weights or self.weights[-1]

    def with_optimizer_state(self, others: Iterable[Mapping[str, np.ndarray]]) -> "LearnerState":
        """The state of one rank as that of all: with the moments that the others keep."""
        arrays = dict(self.optimizer)
        for each in others:
            arrays.update(each)
        return replace(self, optimizer=arrays)


@dataclass(frozen=True)
class Evaluated:
    """A version that is being evaluated, or is to be."""

    current: PolicyWeights  # as samplers sample with them
    average: PolicyWeights | None = None  # the moving average of the versions up to it
    kl_reference_nats: float | None = None  # of a step, to the pretrained model; None: not measured

    @property
    def policy_version(self) -> int:
        return self.current.policy_version


@dataclass(frozen=True)
class EvaluationState:
    """The moving average of all versions so far, and the versions whose evaluation has not been read."""

    average: PolicyWeights | None = None
    pending: tuple[Evaluated, ...] = ()
