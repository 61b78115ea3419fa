"""Prove that weights arrived: by the samplers' reports, and by scoring a few transitions again, computing as samplers do."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TaskReport, TrainBatch
from ray_ddpo.learner.round_data.transitions import RoundTransitions, TransitionIndex
from ray_ddpo.learner.temporary_weights import temporary_weights

NUM_TASKS = 8  # of a round that are looked at, at least: each may have a sampler of its own


class WeightsDidNotArrive(RuntimeError):
    """A batch was not sampled with the weights that its version stands for, whatever its reports say."""


@dataclass(frozen=True)
class Arrival:
    """How far the log-probs of the transitions that were checked lie from the samplers', on the mean scale."""

    largest: float  # computed as samplers do: 0, or rounding in float32 where their batches are composed otherwise
    rounding: float | None = None  # computed as the learner learns. None: it computes as samplers do


def log_prob_tolerance(given: float | None, policy: PolicyConfig) -> float:
    """Return how far log-probs may lie apart that were computed alike: the recipe's bound, else one by the dtype."""
    if given is not None:
        return given
    return 1e-4 if policy.dtype_of("sampler") == torch.float32 else 1e-2


def refuse_mismatch(report: TaskReport, published: tuple[PolicyWeights, ...], parameters: int) -> None:
    """RuntimeError: a task was not sampled with the weights that its version stands for, as its report says."""
    task, known = report.task, {weights.policy_version: weights.fingerprint for weights in published}
    place = f"task {task.index} of round {task.round}"
    if task.policy_version not in known:
        raise RuntimeError(
            f"{place} was sampled with version {task.policy_version}, and the learner keeps {sorted(known)}"
        )
    if known[task.policy_version] != report.fingerprint:
        raise RuntimeError(
            f"{place} was sampled with weights {report.fingerprint[:12]}, and version {task.policy_version} "
            f"is {known[task.policy_version][:12]}"
        )
    if report.num_loaded_params != parameters:
        raise RuntimeError(f"{place}: its sampler bound {report.num_loaded_params} of {parameters} parameters")


def rows_to_check(
    transitions: RoundTransitions, dropped: tuple[int, ...], rows: int
) -> list[list[TransitionIndex | None]]:
    """Return batches of pairs from all tasks in turn, each pair in the row that its image had in its sampler's batch.

    Kernels may round by a row's place in the batch. The tasks begin at different steps. None: nothing to check there.

    Args:
        rows: images of a sampler's batch. There are enough batches to look at NUM_TASKS tasks, if the round has so many.
    """
    numbers = {place: image for image, place in enumerate(transitions.images) if image not in dropped}
    tasks, places = len(transitions.trajectories), transitions.num_trained_steps
    batches: list[list[TransitionIndex | None]] = []
    for start in range(0, min(tasks, NUM_TASKS), rows):
        batch: list[TransitionIndex | None] = []
        for row in range(rows):
            turn = start + row
            in_turn = ((turn + further) % tasks for further in range(tasks))
            task = next((task for task in in_turn if (task, row) in numbers), None)
            batch.append(None if task is None else (numbers[task, row], (turn // tasks + task) % places))
        batches.append(batch)
    return batches


@torch.no_grad()
def log_prob_differences(
    policy: Policy, transitions: RoundTransitions, rows: list[TransitionIndex | None]
) -> Float[Tensor, "B"]:
    """Return |log_prob − old_log_prob| of each row, infinite where it is no number and 0 where there is no pair."""
    filling = next(pair for pair in rows if pair is not None)
    batch = transitions.batch([pair or filling for pair in rows])
    log_prob = policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)
    there = torch.tensor([pair is not None for pair in rows], device=log_prob.device)
    return (log_prob - batch.old_log_probs).abs().nan_to_num(nan=torch.inf).where(there, 0.0)


@final
class ArrivalCheck:
    """Scores a few transitions of each round again under the weights that they were sampled with.

    Like is compared with like: in the samplers' dtype, batch rows and compilation, where the same bits must come out. If
    the learner computes otherwise, it keeps a second copy of the network that computes so, in the host's memory between
    two checks.
    """

    def __init__(self, config: PolicyConfig, recipe: Recipe, policy: Policy) -> None:
        """Load the second copy where one is needed; `policy`: the learner's own."""
        self._policy = policy
        self._rows = recipe.sampling.batch_size
        self._tolerance = log_prob_tolerance(recipe.learner.log_prob_tolerance, config)
        self._copy = None
        if not computes_as_samplers(config, recipe):
            with torch.random.fork_rng(devices=[]):
                self._copy = config.load(policy.device, recipe.sampling, "check")
            if config.is_compiled("check"):
                self._copy.compile(self._rows)
            self._move_copy("cpu")

    def check(
        self,
        batch: TrainBatch,
        transitions: RoundTransitions,
        wanted: PolicyWeights,
        present: PolicyWeights,
        here: Machine,
    ) -> Arrival:
        """Compare the samplers' log-probs with those of the weights that they claim.

        Args:
            wanted: the weights that the round was sampled with, by its reports.
            present: those that the learner's network has, and has again afterwards.
            here: the machine of this process. A sampler on another kind rounds otherwise, which is reported and no fault.

        Raises:
            WeightsDidNotArrive: the log-probs lie further apart than the tolerance.
        """
        _refuse_unnumbered(batch, transitions)
        batches = rows_to_check(transitions, batch.dropped, self._rows)
        batches = [rows for rows in batches if any(rows)]
        rounding = None
        with temporary_weights(self._policy.network, wanted, present):
            found = [log_prob_differences(self._policy, transitions, rows) for rows in batches]
        if self._copy is not None:
            rounding = max((float(each.max()) for each in found), default=0.0)
            self._move_copy(self._policy.device)
            self._copy.load_weights(wanted)
            found = [log_prob_differences(self._copy, transitions, rows) for rows in batches]
            self._move_copy("cpu")
        for rows, differences in zip(batches, found, strict=True):
            for pair, difference in zip(rows, differences.tolist(), strict=True):
                if pair is not None:
                    self._refuse(batch.reports[transitions.images[pair[0]][0]], pair, difference, here)
        return Arrival(max((float(each.max()) for each in found), default=0.0), rounding)

    def _refuse(self, report: TaskReport, pair: TransitionIndex, difference: float, here: Machine) -> None:
        comparable = report.machine is None or report.machine.computes_like(here)
        if difference <= self._tolerance or (not comparable and difference < torch.inf):
            return
        raise WeightsDidNotArrive(
            f"task {report.task.index} says that it was sampled with version {report.task.policy_version}, and at place "
            f"{pair[1]} of its steps its log_prob lies {difference:.2g} from what these weights give when computed as the "
            f"sampler computes, over the tolerance of {self._tolerance:.2g}: it was sampled with other weights, or the "
            "sampler's machine computes wrongly"
        )

    def _move_copy(self, device: str) -> None:
        assert self._copy is not None
        self._copy.network.to(device)
        if self._copy.merged:
            self._copy.merged.to(device)


def _refuse_unnumbered(batch: TrainBatch, transitions: RoundTransitions) -> None:
    """Raise WeightsDidNotArrive if any log-prob of the round is no finite number."""
    for image, (task, row) in enumerate(transitions.images):
        if image not in batch.dropped and not transitions.trajectories[task].log_probs[row].isfinite().all():
            raise WeightsDidNotArrive(
                f"task {task} says that it was sampled with version {batch.reports[task].task.policy_version}, and a log_prob of "
                f"image {row} is no finite number: its network does not compute"
            )


def computes_as_samplers(config: PolicyConfig, recipe: Recipe) -> bool:
    """Return whether the learner's own network gives a sampler's batch the sampler's log-probs, but for float32's rounding."""
    if not config.numerics_differ:
        return True
    same = config.dtype_of("learner") == config.dtype_of("sampler") and not config.merge_adapters
    return same and config.compile == "both" and recipe.learner.micro_batch_size == recipe.sampling.batch_size
