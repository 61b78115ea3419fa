"""OptimizerSteps: gradients of micro-batches and ranks become a step, which is applied only if its gradient is finite."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ray_ddpo.common.model_files.file_faults import first_not_finite
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.tables import LearnerTable
from ray_ddpo.common.trajectory import TrainBatch
from ray_ddpo.learner.algorithms.algorithm import TransitionLoss
from ray_ddpo.learner.algorithms.off_policy import rescale_gradients, to_those_left
from ray_ddpo.learner.optimization.optimizer import is_fused
from ray_ddpo.learner.process_group import OtherRankFailed, Ranks


class NotFinite(RuntimeError):
    """A gradient or a weight is no finite number. Nothing of the round is published."""


@final
class OptimizerSteps:
    """Makes optimizer steps. A step whose gradient is not finite changes neither weights nor optimizer state.

    The device decides that, in the optimizer's own kernel; the host reads it once, in `check`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        settings: LearnerTable,
        device: str,
    ) -> None:
        self._optimizer: Any = optimizer
        self._scaler = scaler
        self._parameters = parameters
        self._ranks = ranks
        self._settings = settings
        self._device = device
        self._masks: list[Tensor] = []  # of the present step's micro-batches
        self._terms: dict[str, Bool[Tensor, ""]] = {}  # of the present step: whether a part of its loss is finite
        self._made: list[
            tuple[Tensor, dict[str, Tensor]] | None
        ] = []  # norm and terms of steps that nobody checked yet

    def begin(self) -> None:
        """Begin an optimizer step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._masks, self._terms = [], {}

    def add(self, result: TransitionLoss, num_pairs: int) -> None:
        """Add the gradient of a micro-batch: its share of the mean over the step's pairs on all ranks."""
        self._scaler.scale(result.loss.sum() / num_pairs).backward()
        self._masks += [] if result.kept is None else [result.kept]
        for name, values in (result.terms or {"loss": result.loss}).items():
            finite = values.detach().isfinite().all()
            self._terms[name] = self._terms[name] & finite if name in self._terms else finite

    def apply(self, num_pairs: int, num_own: int, may_be_zero: bool) -> Float[Tensor, ""] | None:
        """Apply the step if its gradient is finite. Return the gradient's norm before clipping.

        Args:
            num_pairs: pairs of the step on all ranks.
            num_own: those of this rank.
            may_be_zero: whether the gradient may be exactly 0, and is to be looked at for that.

        Returns:
            None if nothing was left to learn from: the step would only follow old momentum, and decay weights.
        """
        left = int(self._ranks.total(int(torch.cat(self._masks).sum()) if self._masks else num_own))
        if not left:
            return self._leave_out()
        if not num_own:
            self._scaler.scale(torch.zeros(1, device=self._device))  # it makes its scale at its first use
        self._ranks.reduce_gradients(self._parameters.values())
        self._scaler.unscale_(self._optimizer)
        if left < num_pairs:
            rescale_gradients(self._parameters.values(), to_those_left(num_pairs, left))
        limit = self._settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), limit, foreach=True)
        if may_be_zero and not norm:
            self._scaler.update()
            return self._leave_out()
        self._step_if_finite(norm)
        self._scaler.update()
        self._made.append((norm.detach(), self._terms))
        self._ranks.check_equal(self._parameters.values())
        return norm

    def _leave_out(self) -> None:
        self._made.append(None)

    def _step_if_finite(self, norm: Float[Tensor, ""]) -> None:
        if not is_fused(self._optimizer):  # bitsandbytes does not look, so the host has to wait for the norm
            if norm.isfinite():
                self._optimizer.step()
            return
        self._optimizer.grad_scale, self._optimizer.found_inf = None, (~norm.isfinite()).float()
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf

    def forget(self) -> None:
        """Forget steps that nobody checked: what they did was undone."""
        self._made = []

    def check(self, batch: TrainBatch, num_steps: int) -> None:
        """Read whether all steps since the last check were finite.

        An overflow of float16's gradients is no fault while the scale is above 1: the scaler has found its limit, and halves it.

        Args:
            batch: what was learned from.
            num_steps: optimizer steps of its round so far.

        Raises:
            NotFinite: a gradient was not finite. It names round, step and the part of the loss.
            OtherRankFailed: it was not, and another rank knows which part of the loss it was.
        """
        made, self._made = self._made, []
        steps = [(place, *each) for place, each in enumerate(made, start=num_steps - len(made) + 1) if each]
        if not steps:
            return
        finite = torch.stack([norm.isfinite() for _, norm, _ in steps]).tolist()
        overflown = [each for each, is_finite in zip(steps, finite, strict=True) if not is_finite]
        for place, _, terms in overflown:
            at_fault = [name for name, is_finite in terms.items() if not is_finite]
            others = self._ranks.largest(len(at_fault))
            if not others and self._scaler.is_enabled() and self._scaler.get_scale() >= 1:
                continue
            if others and not at_fault:
                raise OtherRankFailed("the loss of another rank is not finite, and it says itself which part")
            where = f"round {batch.round}, optimizer step {place} of {num_steps}"
            raise NotFinite(
                f"{where}: {_what(at_fault, list(terms))} not finite, so the step was not applied ({len(overflown)} of the "
                f"round's steps); {_advice(self._settings, batch.round, self._scaler.is_enabled())}"
            )


def _what(at_fault: list[str], terms: list[str]) -> str:
    if at_fault:
        return f"the loss ({' and '.join(at_fault)}) is"
    return f"the loss ({' and '.join(terms)}) is finite and its gradient is"


def _advice(settings: LearnerTable, round: int, half: bool) -> str:
    overflows = 'policy.dtype = "float16" overflows (bfloat16 does not), or ' if half else ""
    saved = (
        "the rounds before are saved: --resume auto repeats this one, --from and another --name train with other keys"
    )
    begin = "nothing was learned yet: begin again with another --name and other keys"
    return f"most likely {overflows}learner.learning_rate = {settings.learning_rate:g} is too high; {saved if round else begin}"


def refuse_weights(weights: PolicyWeights, round: int, settings: LearnerTable) -> None:
    """Raise NotFinite if an update has made a weight that is no finite number."""
    name = first_not_finite(weights.arrays())
    if name is None:
        return
    raise NotFinite(
        f"round {round}: the weights {name} are not finite after it; {_advice(settings, round, half=False)}"
    )
