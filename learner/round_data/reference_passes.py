"""Precompute proximal, behavior and reference outputs before the round's first optimizer step."""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_ddpo.common.diffusion.compiled import graph_of_learning
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.runtime import to_device
from ray_ddpo.common.trajectory import NoisedBatch, TransitionBatch
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.round_data.transitions_index import TrainingItems, TransitionIndex, micro_batches, share_of
from ray_ddpo.learner.temporary_weights import temporary_weights

PerTransition = dict[TransitionIndex, Tensor]
Batch = TransitionBatch | NoisedBatch


@dataclass(frozen=True)
class References:
    """The precomputed outputs that the algorithm needs, by index.

    An index is missing if the transition's own forward pass is under the very same weights. The last four are in the
    host's memory, because they are as large as the latents.
    """

    proximal_log_probs: PerTransition = field(default_factory=dict)
    behavior_means: PerTransition = field(default_factory=dict)
    reference_means: PerTransition = field(default_factory=dict)
    old_predictions: PerTransition = field(default_factory=dict)
    reference_predictions: PerTransition = field(default_factory=dict)

    def added_to(self, batch: Batch, indices: list[TransitionIndex]) -> Batch:
        """Return the batch of these indices with its precomputed outputs."""
        known = {field.name: _rows(getattr(self, field.name), indices, batch) for field in _FIELDS}
        return dataclasses.replace(batch, **{name: rows for name, rows in known.items() if rows is not None})


_FIELDS = dataclasses.fields(References)


def _rows(known: PerTransition, indices: list[TransitionIndex], batch: Batch) -> Tensor | None:
    if indices[0] not in known:
        return None
    device = next(iter(batch.conditioning.values())).device
    return to_device(torch.stack([known[index] for index in indices]), str(device))


@dataclass(frozen=True)
class Update:
    """The plan of a round's update: the indices of each optimizer step, and the weights before and behind it."""

    items: TrainingItems
    epochs: list[list[list[TransitionIndex]]]  # by inner epoch and optimizer step
    sampled_with: PolicyWeights  # the behavior policy's
    present: PolicyWeights  # at the start of the update
    share: tuple[int, int] = (0, 1)  # rank and world size: each rank precomputes its own share only
    is_compiled: bool = False  # the learner's network

    def steps(self, own_pass_will_do: bool) -> list[list[TransitionIndex]]:
        """Return this rank's indices to precompute, by optimizer step, each index once.

        Args:
            own_pass_will_do: leave out the first optimizer step, because its own forward pass is under the weights in
                question. Ignored if the items of that step come again in a later inner epoch.
        """
        again = len(self.epochs) > 1 and self.items.positions(1) == self.items.positions(0)
        steps = [indices for epoch in self.epochs for indices in epoch if indices]
        asked, taken = [], set()
        for indices in steps[1:] if own_pass_will_do and not again else steps:
            # With several ranks, a rank may get in a later epoch what was another's in the first.
            asked.append([index for index in share_of(indices, *self.share) if index not in taken])
            taken.update(asked[-1])
        return [indices for indices in asked if indices]


def references_of(algorithm: Algorithm, policy: Policy, update: Update, micro_batch_size: int) -> References:
    """Precompute the outputs that the algorithm needs, in the update's own micro-batches, so to the same bits."""
    same = update.sampled_with.fingerprint == update.present.fingerprint

    def computed(wanted: bool, own_pass_will_do: bool, output: Callable[[Policy, Batch], Tensor]) -> PerTransition:
        steps = update.steps(own_pass_will_do) if wanted else []
        batches = (part for indices in steps for part in micro_batches(indices, micro_batch_size))
        return _outputs(policy, update.items, batches, output, update.is_compiled)

    proximal = computed(algorithm.needs_proximal_log_probs, True, _log_prob)
    needs_old = algorithm.needs_behavior_means or algorithm.needs_old_predictions
    with temporary_weights(policy.network, update.sampled_with, update.present) if needs_old else nullcontext():
        behavior = computed(algorithm.needs_behavior_means, same, _mean)
        old = computed(algorithm.needs_old_predictions, same, _prediction)
    needs_reference = algorithm.needs_reference_means or algorithm.needs_reference_predictions
    with reference_policy(policy.network) if needs_reference else nullcontext():
        reference = computed(algorithm.needs_reference_means, False, _mean)
        pretrained = computed(algorithm.needs_reference_predictions, False, _prediction)
    return References(proximal, behavior, reference, old, pretrained)


def log_probs_under(policy: Policy, items: TrainingItems, batches: Iterable[list[TransitionIndex]]) -> PerTransition:
    """Compute each transition's log-prob under the policy's current weights, batch by batch."""
    return _outputs(policy, items, batches, _log_prob)


def _outputs(
    policy: Policy,
    items: TrainingItems,
    batches: Iterable[list[TransitionIndex]],
    output: Callable[[Policy, Batch], Tensor],
    is_compiled: bool = False,
) -> PerTransition:
    """Compute `output` of the items of each batch, without gradient."""
    found: PerTransition = {}
    with graph_of_learning(is_compiled):
        for part in batches:
            found |= zip(part, output(policy, items.batch(part)).detach().unbind(), strict=True)
    return found


def _log_prob(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, TransitionBatch)
    return policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)


def _mean(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, TransitionBatch)
    return policy.transition(batch.latents, batch.steps, batch.conditioning).mean.detach().cpu()


def _prediction(policy: Policy, batch: Batch) -> Tensor:
    assert isinstance(batch, NoisedBatch)
    return policy.denoise(batch.clean_latents, batch.noise, batch.timesteps, batch.conditioning)[0].detach().cpu()
