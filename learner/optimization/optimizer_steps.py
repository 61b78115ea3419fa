"""OptimizerSteps: accumulate gradients over micro-batches and ranks, and apply a step if its gradient is finite."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ray_ddpo.common.model_files.file_faults import first_not_finite
from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.algorithm import REWARD_TERM, TransitionLoss
from ray_ddpo.learner.algorithms.off_policy import rescale_gradients, unmasked_mean_factor
from ray_ddpo.learner.optimization.gradients import Gradients, ReplicatedGradients
from ray_ddpo.learner.optimization.optimizer import is_fused, set_learning_rate
from ray_ddpo.learner.process_group import OtherRankFailed, ProcessGroup
from ray_ddpo.learner.temporary_weights import HeldWeights


class NotFinite(RuntimeError):
    """A gradient or a weight is not finite. Nothing of the round is published."""


@final
class OptimizerSteps:
    """The optimizer steps of a learner.

    If a step's gradient is not finite, the step changes neither weights nor optimizer state. The device decides in the
    optimizer's kernel whether to apply a step. The host reads the outcome once, in `check`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Mapping[str, nn.Parameter],
        process_group: ProcessGroup,
        settings: LearnerTable,
        device: str,
        gradients: Gradients | None = None,
    ) -> None:
        """Take over an optimizer and its parameters.

        Args:
            gradients: of the parameters, if their weights are sharded. None: every rank has all of them.
        """
        self._gradients = gradients or ReplicatedGradients(parameters, process_group)
        self._optimizer: Any = optimizer
        self._scaler = scaler
        self._parameters = parameters
        self._process_group = process_group
        self._settings = settings
        self._device = device
        self._any_applied = False  # whether a step was, as far as it was checked
        self._masks: list[Tensor] = []  # of the current step's micro-batches
        self._terms: dict[str, Bool[Tensor, ""]] = {}  # whether a part of the current step's loss is finite
        # Gradient norm and terms of the steps since the last check; None if a step was skipped.
        self._made: list[tuple[Tensor, dict[str, Tensor]] | None] = []

    def begin(self, learning_rate: float) -> None:
        """Begin an optimizer step with this learning rate."""
        set_learning_rate(self._optimizer, learning_rate)
        self._gradients.clear()
        self._masks, self._terms = [], {}

    def add(self, result: TransitionLoss, num_transitions: int) -> None:
        """Add the gradient of a micro-batch: its share of the mean over the step's transitions on all ranks."""
        self._scaler.scale(result.loss.sum() / num_transitions).backward()
        self._masks += [] if result.mask is None else [result.mask]
        for name, values in (result.terms or {"loss": result.loss}).items():
            finite = values.detach().isfinite().all()
            self._terms[name] = self._terms[name] & finite if name in self._terms else finite

    def apply(self, num_transitions: int, num_own: int, may_be_zero: bool) -> Float[Tensor, ""] | None:
        """Apply the step if its gradient is finite. Return the gradient's norm before clipping.

        Args:
            num_transitions: transitions of the step on all ranks.
            num_own: transitions of the step on this rank.
            may_be_zero: the gradient may be exactly 0. Then it is read back, and such a step is skipped.

        Returns:
            None if the step was skipped because all its transitions are masked or its gradient is 0. Such a step would
            only apply momentum and weight decay.
        """
        unmasked = int(
            self._process_group.all_reduce_sum(int(torch.cat(self._masks).sum()) if self._masks else num_own)
        )
        if not unmasked:
            return self._skip()
        if not num_own:
            self._scaler.scale(torch.zeros(1, device=self._device))  # the scaler makes its scale at its first use
        self._gradients.reduce()
        self._scaler.unscale_(self._optimizer)
        if unmasked < num_transitions:
            rescale_gradients(self._parameters.values(), unmasked_mean_factor(num_transitions, unmasked))
        norm = self._gradients.clip(self._settings.max_grad_norm)
        if may_be_zero and not norm:
            self._scaler.update()
            return self._skip()
        self._step_if_finite(norm)
        self._scaler.update()
        self._made.append((norm.detach(), self._terms))
        self._gradients.check()
        return norm

    def _skip(self) -> None:
        self._made.append(None)

    def _step_if_finite(self, norm: Float[Tensor, ""]) -> None:
        """Apply the step if the gradient norm is finite, without a synchronization if the optimizer is fused."""
        if not is_fused(self._optimizer):  # bitsandbytes does not read it, so the host must wait for the norm
            if norm.isfinite():
                self._optimizer.step()
            return
        self._optimizer.grad_scale, self._optimizer.found_inf = None, (~norm.isfinite()).float()
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf

    def forget(self) -> None:
        """Discard steps that were not checked yet, because their effect was undone."""
        self._made, self._any_applied = [], False

    def check(self, batch: TrainBatch, num_steps: int) -> None:
        """Check that all steps since the last check were finite.

        An overflow of float16's gradients is no error while the scale is at least 1, because the scaler then halves its
        scale.

        Args:
            batch: the batch that the steps trained on.
            num_steps: optimizer steps of the batch's round so far.

        Raises:
            NotFinite: a gradient was not finite. The error names round, step and the part of the loss.
            OtherRankFailed: a gradient was not finite, and another rank reports the part of the loss.
        """
        made, self._made = self._made, []
        steps = [(number, *each) for number, each in enumerate(made, start=num_steps - len(made) + 1) if each]
        if not steps:
            return
        finite = torch.stack([norm.isfinite() for _, norm, _ in steps]).tolist()
        for (number, _, terms), is_finite in zip(steps, finite, strict=True):
            if is_finite:
                self._any_applied = True
                continue
            at_fault = [name for name, is_finite in terms.items() if not is_finite]
            others = self._process_group.all_reduce_max(len(at_fault))
            if not others and self._scaler.is_enabled() and self._scaler.get_scale() >= 1:
                continue
            if others and not at_fault:
                raise OtherRankFailed("the loss of another rank is not finite, and that rank reports which part")
            where = f"round {batch.round}, optimizer step {number} of {num_steps}"
            raise NotFinite(
                f"{where}: {_fault(at_fault, list(terms))} not finite, so the step was not applied "
                f"({finite.count(False)} of the round's steps); {self._advice(batch.round, terms)}"
            )

    def _advice(self, round_index: int, terms: Mapping[str, Tensor]) -> str:
        half = self._scaler.is_enabled()
        if not round_index and not self._any_applied:
            return _advice_before_any_step(half, REWARD_TERM in terms)
        return _advice(self._settings, round_index, half)


def _fault(at_fault: list[str], terms: list[str]) -> str:
    if at_fault:
        return f"the loss ({' and '.join(at_fault)}) is"
    return f"the loss ({' and '.join(terms)}) is finite and its gradient is"


def _advice(settings: LearnerTable, round_index: int, half: bool) -> str:
    overflows = 'policy.dtype = "float16" overflows (bfloat16 does not), or ' if half else ""
    saved = (
        "the rounds before are saved: --resume auto repeats this one, --from and another --name train with other keys"
    )
    begin = "nothing was learned yet: begin again with another --name and other keys"
    rate = f"learner.learning_rate = {settings.learning_rate:g} is too high"
    return f"most likely {overflows}{rate}; {saved if round_index else begin}"


def _advice_before_any_step(half: bool, of_reward: bool) -> str:
    """Return what to do if a gradient is not finite under the weights that a run starts with.

    Args:
        half: the network computes in float16.
        of_reward: the loss has the gradient of a reward.
    """
    overflows = ', or policy.dtype = "float16" overflows (bfloat16 does not),' if half else ""
    source = "the reward" if of_reward else "the weights that the run starts with, its images or its rewards"
    look = "look for a root, a logarithm or a quotient at 0 in the reward"
    if not of_reward:
        look = "look at policy.model and policy.dtype, and for very large rewards in rollouts/"
    return (
        f"no step was applied before, so it comes from {source}{overflows} and no learning rate helps: {look}, and begin "
        "again with another --name"
    )


def refuse_weights(weights: HeldWeights, round_index: int, settings: LearnerTable) -> None:
    """Check the weights after an update.

    Raises:
        NotFinite: a weight is not finite.
    """
    name = first_not_finite(weights.arrays())
    if name is None:
        return
    raise NotFinite(
        f"round {round_index}: the weights {name} are not finite after it; {_advice(settings, round_index, half=False)}"
    )
