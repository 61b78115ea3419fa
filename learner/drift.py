"""Measure on a few transitions how far an update moved the policy from the behavior and the pretrained policy."""

from collections.abc import Iterator

import torch

from ray_ddpo.common.diffusion.compiled import graph_of_learning
from ray_ddpo.common.diffusion.lora.adapters import reference_policy
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TransitionBatch
from ray_ddpo.learner.algorithms.losses import gaussian_kl
from ray_ddpo.learner.process_group import ProcessGroup
from ray_ddpo.learner.round_data.transitions import Indices, RoundTransitions, indices_of, micro_batches
from ray_ddpo.learner.update_metrics import Divergence


def kl_subset(
    transitions: RoundTransitions, steps: list[Indices], size: int, process_group: ProcessGroup
) -> Iterator[TransitionBatch]:
    """Select enough images to fill one micro-batch of `size` (at least one) for a KL estimate. Yield this rank's share.

    A larger subset would run a second, mostly padded compiled batch.

    Args:
        steps: the indices of each optimizer step, from whose images the subset is taken.
    """
    positions = transitions.positions(0)
    images = list(dict.fromkeys(image for indices in steps for image in indices[:, 0].tolist()))
    subset = torch.tensor(images[: max(1, size // len(positions))], dtype=torch.int64)
    indices = indices_of(subset, positions)
    return (transitions.batch(part) for part in micro_batches(process_group.share(indices), size))


def divergence(
    policy: Policy, batches: Iterator[TransitionBatch], process_group: ProcessGroup, is_compiled: bool = False
) -> Divergence:
    """Compare the current policy with the behavior policy, on the transitions of all ranks."""
    found: Divergence = []
    with graph_of_learning(is_compiled):
        for batch in batches:
            transition = policy.transition(batch.latents, batch.steps, batch.conditioning)
            found.append((batch.steps, (transition.log_prob(batch.next_latents) - batch.old_log_probs).detach()))
    if process_group.world_size == 1:
        return found
    steps = process_group.all_gather(torch.cat([of_batch for of_batch, _ in found]) if found else None)
    log_ratios = process_group.all_gather(torch.cat([of_batch for _, of_batch in found]) if found else None)
    return [] if steps is None or log_ratios is None else [(steps.long(), log_ratios.float())]


def reference_kl(
    policy: Policy, batches: Iterator[TransitionBatch], process_group: ProcessGroup, is_compiled: bool = False
) -> list[torch.Tensor]:
    """Return the KL to the pretrained policy, on the transitions of all ranks.

    Call this after the update, so that it influences nothing.
    """
    found = []
    with graph_of_learning(is_compiled):
        for batch in batches:
            current = policy.transition(batch.latents, batch.steps, batch.conditioning)
            with reference_policy(policy.network):
                pretrained = policy.transition(batch.latents, batch.steps, batch.conditioning)
            found.append(gaussian_kl(current, pretrained).detach())
    if process_group.world_size == 1:
        return found
    gathered = process_group.all_gather(torch.cat(found) if found else None)
    return [] if gathered is None else [gathered.float()]


def needs_reference_kl(recipe: Recipe, policy_version: int) -> bool:
    """Return whether this version is evaluated and the pretrained policy is available (LoRA only)."""
    due = recipe.evaluation.is_due(policy_version, recipe.rounds)
    return due and recipe.policy.table().get("train", "lora") == "lora"
