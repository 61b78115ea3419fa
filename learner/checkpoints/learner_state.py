"""LearnerState: the state from which the learner resumes bit for bit; and the state of evaluation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights


@dataclass(frozen=True)
class LearnerState:
    """The published weights, the trained weights, the optimizer state, and the gradient scaler."""

    policy_version: int
    weights: tuple[PolicyWeights, ...]  # the published versions that `kept_versions` keeps, the newest last
    optimizer: dict[str, np.ndarray]  # by "<parameter>/<AdamW's key>"; if sharded, one rank's shard
    scaler: dict[str, int | float]  # of float16's gradient scaler; empty otherwise
    own_weights: PolicyWeights | None = None  # the trained weights, if samplers use an average of versions
    micro_batch_size: int | None = None  # decides the last bits; None: not known
    machine: Machine | None = None  # the learner's; None: not known
    recomputes: bool | None = None  # whether gradient checkpointing is on; None: not known
    reference: PolicyWeights | None = None  # the policy that is the KL's reference; None: the pretrained model
    value: dict[str, np.ndarray] = field(default_factory=dict)  # a value function's weights and optimizer state

    @property
    def trained(self) -> PolicyWeights:
        """The trained weights: the newest published ones, unless those are an average."""
        return self.own_weights or self.weights[-1]

    def with_optimizer_state(self, others: Iterable[Mapping[str, np.ndarray]]) -> "LearnerState":
        """Return one rank's state with the optimizer state of other ranks added."""
        arrays = dict(self.optimizer)
        for each in others:
            arrays.update(each)
        return replace(self, optimizer=arrays)


@dataclass(frozen=True)
class EvalVersion:
    """A policy version whose evaluation is running or due."""

    current: PolicyWeights  # the weights that samplers use
    average: PolicyWeights | None = None  # the moving average of the versions up to it
    kl_reference_nats: float | None = None  # KL of a step to the pretrained model; None: not measured

    @property
    def policy_version(self) -> int:
        return self.current.policy_version


@dataclass(frozen=True)
class EvaluationState:
    """The moving average of all versions so far, and the versions whose evaluation was not read yet."""

    average: PolicyWeights | None = None
    pending: tuple[EvalVersion, ...] = ()
