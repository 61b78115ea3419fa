"""How far an update has moved the policy, from the one that sampled and from the pretrained one: on a few of its pairs."""

from collections.abc import Iterator

import numpy as np
import torch

from ray_ddpo.common.diffusion.compiled import graph_of_learning
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.learner.algorithms.losses import gaussian_kl
from ray_ddpo.learner.process_group import Ranks
from ray_ddpo.learner.round_data.transitions import RoundTransitions
from ray_ddpo.learner.round_data.transitions_index import TransitionIndex, micro_batches
from ray_ddpo.learner.update_metrics import Divergence


def few(
    transitions: RoundTransitions, steps: list[list[TransitionIndex]], size: int, ranks: Ranks
) -> Iterator[TransitionBatch]:
    """As many of the images learned from as one batch of `size` takes with all their steps, at least one; this rank's share.

    No more: a compiled network takes for a batch that is hardly filled what it takes for a full one.
    """
    images = list(dict.fromkeys(image for pairs in steps for image, _ in pairs))
    pairs = transitions.pairs_of(np.array(images[: max(1, size // transitions.num_places)]))
    return (transitions.batch(part) for part in micro_batches(ranks.share(pairs), size))


def divergence(
    policy: Policy, batches: Iterator[TransitionBatch], ranks: Ranks, is_compiled: bool = False
) -> Divergence:
    """Where the present policy stands against the one that sampled: of all ranks' pairs."""
    found: Divergence = []
    with graph_of_learning(is_compiled):
        for batch in batches:
            transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
            found.append((batch.steps, (transition.log_prob(batch.next_latents) - batch.old_log_probs).detach()))
    if ranks.count == 1:
        return found
    steps = ranks.gathered(torch.cat([of_batch for of_batch, _ in found]) if found else None)
    log_ratios = ranks.gathered(torch.cat([of_batch for _, of_batch in found]) if found else None)
    return [] if steps is None or log_ratios is None else [(steps.long(), log_ratios.float())]


@torch.no_grad()
def reference_kl(policy: Policy, batches: Iterator[TransitionBatch], ranks: Ranks) -> list[torch.Tensor]:
    """KL to the pretrained policy; taken after the update, so that it decides nothing. Of all ranks' pairs."""
    found = []
    for batch in batches:
        present = policy.transition(batch.latents, batch.steps, batch.conditioning)
        with reference_policy(policy.network):
            pretrained = policy.transition(batch.latents, batch.steps, batch.conditioning)
        found.append(gaussian_kl(present, pretrained))
    if ranks.count == 1:
        return found
    gathered = ranks.gathered(torch.cat(found) if found else None)
    return [] if gathered is None else [gathered.float()]
