"""Check that samplers had the right weights: by their reports, and by re-computing a few log-probs."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.trajectory import TaskReport, TrainBatch
from ray_ddpo.learner.round_data.transitions import Indices, RoundTransitions
from ray_ddpo.learner.sharding.weight_shards import WeightShards
from ray_ddpo.learner.temporary_weights import HeldWeights, temporary_weights

NUM_TASKS = 8  # the fewest tasks of a round to check, since each may come from another sampler


class WeightsDidNotArrive(RuntimeError):
    """A batch was not sampled with the weights of its version, although its reports say so."""


@dataclass(frozen=True)
class Arrival:
    """The largest differences between re-computed log-probs and those of the samplers, on the mean scale."""

    largest: float  # with the samplers' numerics: 0, or float32 rounding if batches are composed otherwise
    rounding: float | None = None  # with the learner's numerics; None if they are the samplers'


def log_prob_tolerance(given: float | None, policy: PolicyConfig) -> float:
    """Return the tolerance for log-probs computed with equal numerics: the recipe's, else one by the dtype."""
    if given is not None:
        return given
    return 1e-4 if policy.dtype_of("sampler") == torch.float32 else 1e-2


def refuse_mismatch(report: TaskReport, published: tuple[HeldWeights, ...], parameters: int) -> None:
    """Compare a task's report with the published weights.

    Raises:
        RuntimeError: the task was not sampled with the weights of its version.
    """
    task, known = report.task, {weights.policy_version: weights.fingerprint for weights in published}
    title = f"task {task.index} of round {task.round}"
    if task.policy_version not in known:
        raise RuntimeError(
            f"{title} was sampled with version {task.policy_version}, and the learner keeps {sorted(known)}"
        )
    if known[task.policy_version] != report.fingerprint:
        raise RuntimeError(
            f"{title} was sampled with weights {report.fingerprint[:12]}, and version {task.policy_version} "
            f"is {known[task.policy_version][:12]}"
        )
    if report.num_loaded_params != parameters:
        raise RuntimeError(f"{title}: its sampler has loaded {report.num_loaded_params} of {parameters} parameters")


def rows_to_check(transitions: RoundTransitions, dropped: tuple[int, ...], rows: int) -> list[Indices]:
    """Return batches of transitions to check, taken from all tasks in turn, beginning at different steps.

    Each transition is in the row that its image had in the sampler's batch, because kernels may round by row.

    Args:
        rows: images of a sampler's batch.

    Returns:
        The (image, step) indices of enough batches to check NUM_TASKS tasks, if the round has so many. The index is
        (−1, −1) in a row that has nothing to check. A batch of such rows alone is left out.
    """
    places = zip(transitions.task.tolist(), transitions.row.tolist(), strict=True)
    numbers = {place: image for image, place in enumerate(places) if image not in dropped}
    tasks, num_steps = len(transitions.trajectories), len(transitions.positions(0))
    batches = []
    for start in range(0, min(tasks, NUM_TASKS), rows):
        batch = torch.full((rows, 2), -1)
        for row in range(rows):
            turn = start + row
            in_turn = ((turn + further) % tasks for further in range(tasks))
            task = next((task for task in in_turn if (task, row) in numbers), None)
            if task is not None:
                batch[row] = torch.tensor([numbers[task, row], (turn // tasks + task) % num_steps])
        if (batch >= 0).any():
            batches.append(batch)
    return batches


@torch.no_grad()
def log_prob_differences(policy: Policy, transitions: RoundTransitions, rows: Int[Tensor, "B 2"]) -> Float[Tensor, "B"]:
    """Return |log_prob − old_log_prob| of each row: infinity if it is NaN, and 0 if the row has no transition."""
    there = rows[:, 0] >= 0
    batch = transitions.batch(torch.where(there.unsqueeze(1), rows, rows[there][0]))
    log_prob = policy.transition(batch.latents, batch.steps, batch.conditioning).log_prob(batch.next_latents)
    difference = (log_prob - batch.old_log_probs).abs().nan_to_num(nan=torch.inf)
    return difference.where(there.to(log_prob.device), 0.0)


@final
class ArrivalCheck:
    """A check that re-computes a few transitions' log-probs in each round, under the weights they were sampled with.

    The check uses the samplers' dtype, batch rows and compilation, so that the same bits must result. If the learner's
    numerics differ, the check has a second copy of the network, kept in the host's memory between two checks.
    """

    def __init__(self, config: PolicyConfig, recipe: Recipe, policy: Policy) -> None:
        """Load the second copy of the network if it is needed.

        Args:
            policy: the learner's.
        """
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
        wanted: HeldWeights,
        present: HeldWeights,
        here: Machine,
    ) -> Arrival:
        """Compare the samplers' log-probs with those under the weights of the round's version.

        Args:
            wanted: the weights that the round was sampled with, by its reports.
            present: the weights of the learner's network, which are loaded again afterwards.
            here: this machine. A sampler on another kind of machine rounds otherwise, which is reported and no error.

        Raises:
            WeightsDidNotArrive: the log-probs differ by more than the tolerance.
        """
        refuse_unnumbered(batch, transitions)
        # Replayed images were checked in their own round, and other weights sampled them.
        batches = rows_to_check(transitions, (*batch.dropped, *batch.replayed), self._rows)
        rounding = None
        with temporary_weights(self._policy.network, wanted, present):
            found = [log_prob_differences(self._policy, transitions, rows) for rows in batches]
        if self._copy is not None:
            assert not isinstance(wanted, WeightShards), "a recipe with sharded weights needs no second copy"
            rounding = max((float(each.max()) for each in found), default=0.0)
            self._move_copy(self._policy.device)
            self._copy.load_weights(wanted)
            found = [log_prob_differences(self._copy, transitions, rows) for rows in batches]
            self._move_copy("cpu")
        for rows, differences in zip(batches, found, strict=True):
            for (image, step), difference in zip(rows.tolist(), differences.tolist(), strict=True):
                if image >= 0:
                    self._refuse(batch.reports[int(transitions.task[image])], step, difference, here)
        return Arrival(max((float(each.max()) for each in found), default=0.0), rounding)

    def _refuse(self, report: TaskReport, step: int, difference: float, here: Machine) -> None:
        """Raise WeightsDidNotArrive if a difference is above the tolerance, unless the machines are not comparable."""
        comparable = report.machine is None or report.machine.computes_like(here)
        if difference <= self._tolerance or (not comparable and difference < torch.inf):
            return
        raise WeightsDidNotArrive(
            f"task {report.task.index} says that it was sampled with version {report.task.policy_version}, and at its "
            f"trained step {step} the log_prob differs by {difference:.2g} from that of these weights in the "
            f"sampler's numerics, over the tolerance of {self._tolerance:.2g}: it was sampled with other weights, or "
            "the sampler's machine computes wrongly"
        )

    def _move_copy(self, device: str) -> None:
        assert self._copy is not None
        self._copy.network.to(device)
        if self._copy.merged:
            self._copy.merged.to(device)


def refuse_unnumbered(batch: TrainBatch, transitions: RoundTransitions) -> None:
    """Raise WeightsDidNotArrive if a log-prob of the round is not finite."""
    broken = (~transitions.log_probs.isfinite().all(1)).nonzero().flatten().tolist()
    for image in broken:
        if image not in batch.dropped:
            task, row = int(transitions.task[image]), int(transitions.row[image])
            raise WeightsDidNotArrive(
                f"task {task} says that it was sampled with version {batch.reports[task].task.policy_version}, and a "
                f"log_prob of image {row} is no finite number: its network does not compute"
            )


def computes_as_samplers(config: PolicyConfig, recipe: Recipe) -> bool:
    """Return whether the learner's network computes a sampler's log-probs, up to float32 rounding."""
    if not config.numerics_differ:
        return True
    same = config.dtype_of("learner") == config.dtype_of("sampler") and not config.merge_adapters
    same = same and config.sampler_storage is None
    return same and config.compile == "both" and recipe.learner.micro_batch_size == recipe.sampling.batch_size
