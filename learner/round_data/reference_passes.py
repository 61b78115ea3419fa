"""Precompute proximal, behavior and reference outputs before the round's first optimizer step."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import graph_of_learning
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import Column, NoisedBatch, RestartBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.losses import squared_error
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.noised_samples import NoisedSamples
from ray_ddpo.learner.round_data.restarts import Restarts
from ray_ddpo.learner.round_data.transitions import Indices, RoundTransitions, micro_batches
from ray_ddpo.learner.temporary_weights import HeldWeights, temporary_weights

Batch = TransitionBatch | NoisedBatch | RestartBatch
Items = RoundTransitions | NoisedSamples | Restarts


class OutputColumn:
    """A column of outputs under other weights, one for each item of a round.

    Rows that are not computed are not written either, so the operating system gives them no memory.
    """

    def __init__(self, num_images: int, num_positions: int) -> None:
        self.computed: Bool[Tensor, "N W"] = torch.zeros(num_images, num_positions, dtype=torch.bool)
        self.values: Float[Tensor, "N W ..."] = torch.empty(0)

    def fill(self, indices: Indices, outputs: Float[Tensor, "B ..."]) -> None:
        """Write the rows of a micro-batch. The column is on the device of the first outputs."""
        if not self.computed.any():
            self.values = outputs.new_empty(*self.computed.shape, *outputs.shape[1:])
        self.values[self._index(indices)] = outputs
        self.computed[indices.unbind(1)] = True

    def rows(self, indices: Indices) -> Float[Tensor, "B ..."] | None:
        """Return the rows of a micro-batch. None: its own forward pass is under the very same weights."""
        return self.values[self._index(indices)] if self.computed[tuple(indices[0])] else None

    def _index(self, indices: Indices) -> tuple[Tensor, ...]:
        return to_device(indices, str(self.values.device)).unbind(1)


Columns = Mapping[Column, OutputColumn]


def with_columns(batch: Batch, columns: Columns, indices: Indices, device: str) -> Batch:
    """Return the batch of these indices with its precomputed columns."""
    rows = {name: column.rows(indices) for name, column in columns.items()}
    there = {name: to_device(values, device) for name, values in rows.items() if values is not None}
    return dataclasses.replace(batch, **there)


@dataclass(frozen=True)
class Update:
    """The plan of a round's update: the indices of each optimizer step, and the weights before and behind it."""

    items: Items
    epochs: list[list[Indices]]  # by inner epoch and optimizer step
    sampled_with: HeldWeights  # the behavior policy's
    present: HeldWeights  # at the start of the update
    process_group: ProcessGroup = field(default_factory=ProcessGroup)  # each rank precomputes its own share only
    is_compiled: bool = False  # the learner's network
    reference: HeldWeights | None = None  # of the reference policy; None: the pretrained model
    in_step: bool = False  # all ranks take part in every pass, because weights are sharded

    def column(self) -> OutputColumn:
        """Return an empty column of the items of all inner epochs."""
        return OutputColumn(self.items.num_images, self.items.positions(len(self.epochs) - 1).stop)

    def steps(self, own_pass_will_do: bool) -> list[Indices]:
        """Return this rank's indices to precompute, by optimizer step, each index once.

        Args:
            own_pass_will_do: leave out the first optimizer step, because its own forward pass is under the weights in
                question. Ignored if the items of that step come again in a later inner epoch.
        """
        again = len(self.epochs) > 1 and self.items.positions(1) == self.items.positions(0)
        steps = [indices for epoch in self.epochs for indices in epoch if len(indices)]
        asked, taken = [], self.column().computed
        for indices in steps[1:] if own_pass_will_do and not again else steps:
            # With several ranks, a rank may get in a later epoch what was another's in the first.
            own, _ = self.process_group.share_of_step(indices, even=self.in_step)
            asked.append(own[~taken[own.unbind(1)]])
            taken[own.unbind(1)] = True
        return [indices for indices in asked if len(indices)]

    def spare_batch(self, batches: list[Indices]) -> tuple[Indices, int]:
        """Return a batch, and how often to pass it for the other ranks' sake, who have more batches than this one.

        A collective if weights are sharded.
        """
        missing = int(self.process_group.all_reduce_max(len(batches))) - len(batches) if self.in_step else 0
        return batches[0] if batches else torch.tensor([[0, self.items.positions(0).start]]), missing


def precomputed_columns(algorithm: Algorithm, policy: Policy, update: Update, micro_batch_size: int) -> Columns:
    """Precompute the columns that the algorithm asks for, in the update's own micro-batches, so to the same bits."""
    same = update.sampled_with.fingerprint == update.present.fingerprint
    asked = set(algorithm.columns)
    columns: dict[Column, OutputColumn] = {}

    def compute(name: Column, own_pass_will_do: bool, output: Callable[[Policy, Batch], Tensor]) -> None:
        if name in asked:
            steps = update.steps(own_pass_will_do)
            batches = [part for indices in steps for part in micro_batches(indices, micro_batch_size)]
            columns[name] = _filled(update.column(), policy, update.items, batches, output, update.is_compiled)
            spare, times = update.spare_batch(batches)
            with graph_of_learning(update.is_compiled):
                for _ in range(times):
                    output(policy, update.items.batch(spare))

    compute("proximal_log_probs", True, _log_prob)
    compute("proximal_means", True, _mean)
    needs_old = asked & {"behavior_means", "old_predictions", "old_errors"}
    with temporary_weights(policy.network, update.sampled_with, update.present) if needs_old else nullcontext():
        compute("behavior_means", same, _mean)
        compute("old_predictions", same, _prediction)
        compute("old_errors", same, denoising_errors)
    needs_reference = asked & {"reference_means", "reference_predictions", "reference_errors"}
    moved = update.reference
    reference = reference_policy(policy.network)
    if moved is not None:
        reference = temporary_weights(policy.network, moved, update.present)
    with reference if needs_reference else nullcontext():
        compute("reference_means", False, _mean)
        compute("reference_predictions", False, _prediction)
        compute("reference_errors", False, denoising_errors)
    return columns


def log_probs_under(
    policy: Policy, transitions: RoundTransitions, batches: Iterable[Indices], is_compiled: bool = False
) -> Float[Tensor, "N W"]:
    """Compute each transition's log-prob under the policy's current weights, batch by batch."""
    return _filled(OutputColumn(*transitions.steps.shape), policy, transitions, batches, _log_prob, is_compiled).values


def _filled(
    column: OutputColumn,
    policy: Policy,
    items: Items,
    batches: Iterable[Indices],
    output: Callable[[Policy, Batch], Tensor],
    is_compiled: bool = False,
) -> OutputColumn:
    """Fill the column with `output` of each batch, without gradient."""
    with graph_of_learning(is_compiled):
        for indices in batches:
            column.fill(indices, output(policy, items.batch(indices)).detach())
    return column


def _log_prob(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, TransitionBatch)
    return policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)


def _mean(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, TransitionBatch)
    return policy.transition(batch.latents, batch.steps, batch.conditioning).mean.detach().cpu()


def _prediction(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, NoisedBatch)
    return policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)[0].detach().cpu()


def denoising_errors(policy: Policy, batch: Batch) -> Float[Tensor, "B"]:
    """Return the mean squared error of each sample's prediction under the policy's current weights."""
    assert isinstance(batch, NoisedBatch)
    return squared_error(*policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning))
