"""What pairs have under weights that an update moves away from, or that the samplers had: taken before its first step."""

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

Known = dict[TransitionIndex, Tensor]
Batch = TransitionBatch | NoisedBatch


@dataclass(frozen=True)
class References:
    """Of each pair, what the algorithm asks for; nothing of a pair whose own forward pass is under those very weights."""

    proximal_log_probs: Known = field(default_factory=dict)
    behavior_means: Known = field(default_factory=dict)  # these four in the host's memory: as large as the paths
    reference_means: Known = field(default_factory=dict)
    old_predictions: Known = field(default_factory=dict)
    reference_predictions: Known = field(default_factory=dict)

    def laid_into(self, batch: Batch, pairs: list[TransitionIndex]) -> Batch:
        """The batch of these pairs, with what is known of them."""
        known = {field.name: _rows(getattr(self, field.name), pairs, batch) for field in _FIELDS}
        return dataclasses.replace(batch, **{name: rows for name, rows in known.items() if rows is not None})


_FIELDS = dataclasses.fields(References)


def _rows(known: Known, pairs: list[TransitionIndex], batch: Batch) -> Tensor | None:
    if pairs[0] not in known:
        return None
    device = next(iter(batch.conditioning.values())).device
    return to_device(torch.stack([known[pair] for pair in pairs]), str(device))


@dataclass(frozen=True)
class Update:
    """Where references are taken: the pairs of each inner epoch's optimizer steps, and the weights of both sides."""

    pairs: TrainingItems
    epochs: list[list[list[TransitionIndex]]]
    sampled_with: PolicyWeights
    present: PolicyWeights
    share: tuple[int, int] = (0, 1)  # rank, and how many there are: each takes its own pairs' alone
    is_compiled: bool = False  # the learner's network

    def steps(self, own_pass_will_do: bool) -> list[list[TransitionIndex]]:
        """The optimizer steps whose pairs are asked for, each pair once; of each its share.

        `own_pass_will_do`: the first step's own pass is under those very weights; not where its pairs come again later.
        """
        again = len(self.epochs) > 1 and self.pairs.places(1) == self.pairs.places(0)
        steps = [pairs for epoch in self.epochs for pairs in epoch if pairs]
        asked, taken = [], set()
        for pairs in steps[1:] if own_pass_will_do and not again else steps:
            # Of several ranks, one may have in a later epoch what was another's in the first.
            asked.append([pair for pair in share_of(pairs, *self.share) if pair not in taken])
            taken.update(asked[-1])
        return [pairs for pairs in asked if pairs]


def references_of(algorithm: Algorithm, policy: Policy, update: Update, micro_batch_size: int) -> References:
    """All that the algorithm asks for, in micro-batches as they will be learned from, to the same bits."""
    same = update.sampled_with.fingerprint == update.present.fingerprint

    def taken(wanted: bool, own_pass_will_do: bool, look: Callable[[Policy, Batch], Tensor]) -> Known:
        steps = update.steps(own_pass_will_do) if wanted else []
        batches = (part for pairs in steps for part in micro_batches(pairs, micro_batch_size))
        return _looked_at(policy, update.pairs, batches, look, update.is_compiled)

    proximal = taken(algorithm.needs_proximal_log_probs, True, _log_prob)
    needs_old = algorithm.needs_behavior_means or algorithm.needs_old_predictions
    with temporary_weights(policy.network, update.sampled_with, update.present) if needs_old else nullcontext():
        behavior = taken(algorithm.needs_behavior_means, same, _mean)
        old = taken(algorithm.needs_old_predictions, same, _prediction)
    needs_reference = algorithm.needs_reference_means or algorithm.needs_reference_predictions
    with reference_policy(policy.network) if needs_reference else nullcontext():
        reference = taken(algorithm.needs_reference_means, False, _mean)
        pretrained = taken(algorithm.needs_reference_predictions, False, _prediction)
    return References(proximal, behavior, reference, old, pretrained)


def log_probs_under(policy: Policy, pairs: TrainingItems, batches: Iterable[list[TransitionIndex]]) -> Known:
    """Each pair's log_prob under the policy as it is, a batch after the other."""
    return _looked_at(policy, pairs, batches, _log_prob)


def _looked_at(
    policy: Policy,
    pairs: TrainingItems,
    batches: Iterable[list[TransitionIndex]],
    look: Callable[[Policy, Batch], Tensor],
    is_compiled: bool = False,
) -> Known:
    found: Known = {}
    with graph_of_learning(is_compiled):
        for part in batches:
            found |= zip(part, look(policy, pairs.batch(part)).detach().unbind(), strict=True)
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
