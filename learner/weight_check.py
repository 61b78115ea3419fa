"""Proof that weights arrived: by the samplers' reports, and by a few transitions scored again under the version claimed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.diffusion.lora import load_weights
from common.diffusion.policy import Policy, PolicyConfig
from common.lora_weights import LoraWeights
from common.trajectory import TaskReport
from learner.round_transitions import Pair, RoundTransitions


class WeightsDidNotArrive(RuntimeError):
    """A batch was not drawn with the weights that its version stands for, whatever its reports say."""


def log_prob_tolerance(given: float | None, policy: PolicyConfig) -> float:
    """How far sampler and learner may lie apart: as the recipe says, else by how exactly the networks compute."""
    if given is not None:
        return given
    return 1e-2 if policy.dtype != "float32" or policy.numerics_differ else 1e-4


@contextmanager
def swapped_in(network: Any, wanted: LoraWeights, present: LoraWeights) -> Iterator[None]:
    """The network under the weights `wanted`, and then under `present`, which it had before, to the last bit again."""
    if wanted.fingerprint == present.fingerprint:
        yield
        return
    load_weights(network, wanted)
    try:
        yield
    finally:
        load_weights(network, present)


def refuse_mismatch(report: TaskReport, published: tuple[LoraWeights, ...], parameters: int) -> None:
    """RuntimeError: a task was not drawn with the weights that its version stands for, as its report says."""
    task, known = report.task, {weights.policy_version: weights.fingerprint for weights in published}
    place = f"task {task.index} of round {task.round}"
    if task.policy_version not in known:
        raise RuntimeError(
            f"{place} was drawn with version {task.policy_version}, and the learner keeps {sorted(known)}"
        )
    if known[task.policy_version] != report.fingerprint:
        raise RuntimeError(
            f"{place} was drawn with weights {report.fingerprint[:12]}, and version {task.policy_version} "
            f"is {known[task.policy_version][:12]}"
        )
    if report.modules_bound != parameters:
        raise RuntimeError(f"{place}: its sampler bound {report.modules_bound} of {parameters} parameters")


def pairs_to_check(transitions: RoundTransitions, set_aside: tuple[int, ...], size: int) -> list[Pair]:
    """At most `size` pairs, from all tasks in turn: any of them may have been drawn by a sampler of its own.

    Of each task its first images come first, with all their steps, the tasks beginning at different ones.
    """
    of_tasks: dict[int, list[Pair]] = {}
    for image, (task, _) in enumerate(transitions.images):
        if image not in set_aside:
            places = [(place + task) % transitions.num_places for place in range(transitions.num_places)]
            of_tasks.setdefault(task, []).extend((image, place) for place in places)
    longest = max(map(len, of_tasks.values()), default=0)
    in_turn = ((turn, task) for turn in range(longest) for task in of_tasks)
    return [of_tasks[task][turn] for turn, task in in_turn if turn < len(of_tasks[task])][:size]


@torch.no_grad()
def check_arrival(
    policy: Policy, transitions: RoundTransitions, pairs: list[Pair], version: int, tolerance: float
) -> float:
    """The largest |log_prob − old_log_prob| of `pairs`, on the mean scale, with the policy under `version`'s weights.

    Without pairs, because all images are set aside, it is 0. WeightsDidNotArrive: it is over `tolerance`.
    """
    if not pairs:
        return 0.0
    batch = transitions.batch(pairs)
    log_prob = policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)
    differences = (log_prob - batch.old_log_probs).abs()
    worst = int(differences.nan_to_num(nan=torch.inf).argmax())
    largest = float(differences[worst])
    if not largest <= tolerance:
        raise WeightsDidNotArrive(
            f"task {transitions.images[pairs[worst][0]][0]} says that it was drawn with version {version}, and at step "
            f"{int(batch.steps[worst])} its log_prob lies {largest:.2g} from what these weights give, over the "
            f"tolerance of {tolerance:.2g}: it was drawn with other weights, or sampler and learner compute differently "
            "(another dtype, or one of them compiled). Only in the second case is learner.log_prob_tolerance to be raised"
        )
    return largest
