"""What pairs have under weights that an update moves away from, or that the samplers had: taken before its first step."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.diffusion.policy import Policy
from common.trajectory import TransitionBatch
from learner.round_transitions import Pair, RoundTransitions


@dataclass(frozen=True)
class References:
    """Of each pair, what the algorithm asks for; nothing of a pair whose own forward pass is under those very weights."""

    proximal_log_probs: dict[Pair, Tensor] = field(default_factory=dict)
    behaviour_means: dict[Pair, Tensor] = field(default_factory=dict)  # in the host's memory: as large as the paths

    def laid_into(self, batch: TransitionBatch, pairs: list[Pair]) -> TransitionBatch:
        """The batch of these pairs, with what is known of them."""
        device = batch.steps.device
        return dataclasses.replace(
            batch,
            proximal_log_probs=_rows(self.proximal_log_probs, pairs, device),
            behaviour_means=_rows(self.behaviour_means, pairs, device),
        )


def _rows(known: dict[Pair, Tensor], pairs: list[Pair], device: torch.device) -> Tensor | None:
    if pairs[0] not in known:
        return None
    return torch.stack([known[pair] for pair in pairs]).to(device, non_blocking=True)


@torch.no_grad()
def log_probs_under(policy: Policy, transitions: RoundTransitions, batches: Iterable[list[Pair]]) -> dict[Pair, Tensor]:
    """Each pair's log_prob under the policy as it is; in micro-batches as they will be learned from, to the same bits."""
    found = {}
    for pairs in batches:
        batch = transitions.batch(pairs)
        log_prob = policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)
        found |= zip(pairs, log_prob.unbind(), strict=True)
    return found


@torch.no_grad()
def means_under(policy: Policy, transitions: RoundTransitions, batches: Iterable[list[Pair]]) -> dict[Pair, Tensor]:
    """The mean of each pair's transition under the policy as it is."""
    found = {}
    for pairs in batches:
        batch = transitions.batch(pairs)
        mean = policy.transition(batch.latents, batch.steps, batch.conditioning).mean
        found |= zip(pairs, mean.cpu().unbind(), strict=True)
    return found
