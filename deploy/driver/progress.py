"""RunProgress: the rounds that a run has trained on, and how many of them are checkpointed."""

import dataclasses
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_ddpo.common.base_parts import Base, as_tables
from ray_ddpo.common.diffusion.network_calls import calls_per_image
from ray_ddpo.common.group_spread import Refill
from ray_ddpo.common.machine import Machine
from ray_ddpo.common.metrics.diagnoses import CollapseWatch, bottleneck
from ray_ddpo.common.metrics.mfu import mfu_metrics
from ray_ddpo.common.metrics.round_metrics import RoundClock, memory_now, refill_metrics, reward_metrics, round_metrics
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.run_storage.storage import StorageError
from ray_ddpo.common.trackers.fan_out import FanOut
from ray_ddpo.common.trajectory import Rollout, Scored, TrainBatch, whole_round
from ray_ddpo.deploy.driver.cluster import has_cores_to_overlap
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.gpu_layout import roles_of
from ray_ddpo.deploy.driver.numerics_notes import NumericsNotes
from ray_ddpo.deploy.driver.round_media import first_images, round_media
from ray_ddpo.deploy.driver.round_work import ImageWork
from ray_ddpo.deploy.driver.workers import Workers
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.round_data.round_buffer import RoundBuffer

if TYPE_CHECKING:
    from ray_ddpo.deploy.evaluation.eval_runner import EvalRunner

Metrics = dict[str, float]
FAILED_ROUNDS = 3  # consecutive rounds with a storage error, after which the run ends
REMEMBERED = 256  # rounds whose metrics are kept, so that a run of many thousands does not grow in memory


class RunProgress:
    """Records a round after its update; commits it if a checkpoint is due, or at once if the run is stopped."""

    def __init__(
        self,
        components: Components,
        trackers: FanOut,
        evaluating: "EvalRunner",
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        base: Base,
    ) -> None:
        recipe = components.recipe
        self._components = components
        self._checkpoints, self._location = folder.checkpoints, folder.location
        self._unwritten = folder.unwritten
        self._failed_rounds = 0  # in a row
        self._trackers = trackers
        self.evaluating = evaluating
        self._base = base
        started = recipe.start_from.model_dump() if recipe.start_from else None
        about: dict[str, Any] = {"base": as_tables(base), "start_from": started}
        if recipe.sampling.shared_prefix:
            about["shared_prefix"] = True
        self._ledger = Ledger(folder.storage, recipe.rollouts, about, folder.unwritten)
        self._done: Checkpoint | None = None  # after the last complete round of this start
        self._starts_trained = checkpoint is not None
        attempts = components.algorithm.refill_attempts
        self._refill = Refill.of(recipe, attempts) if attempts else None
        self.buffer = RoundBuffer(
            components.algorithm,
            components.aggregation,
            recipe.prompts.images_per_prompt,
            recipe.reward_workers.max_dropped,
            recipe.learner.parts_per_round,
            self._refill,
        )
        groups = recipe.images_per_round // recipe.prompts.images_per_prompt
        self.collapse = CollapseWatch(groups, recipe.learner.learning_rate)
        self.rounds_done = self._committed = checkpoint.rounds_done if checkpoint else 0
        self.metrics: deque[Metrics] = deque(maxlen=REMEMBERED)  # of the last rounds since this start
        if checkpoint:
            self.buffer.statistics = checkpoint.statistics
            self.buffer.dropped = {index: list(images) for index, images in checkpoint.dropped.items()}
        self._ledger.cut(self.rounds_done)
        self._numerics: NumericsNotes | None = None

    def begin(self, learner: Machine | None, before: Machine | None) -> None:
        """Compare the machines of this start with `before`, the learner's machine at the checkpoint."""
        self._numerics = NumericsNotes(learner, before) if learner else None

    def learned(self, state: LearnerState, metrics: Metrics) -> None:
        """Record that the learner has finished a round. From here on, a stop commits this round."""
        self.rounds_done = state.policy_version
        self.evaluating.learned(state.weights[-1], metrics.get("kl_reference_nats"))
        dropped = {index: list(images) for index, images in self.buffer.dropped.items()}
        ids = self._trackers.identities()
        rounds = self.rounds_done if self._components.recipe.rollouts.keep else 0
        self._done = Checkpoint(self.rounds_done, state, self.buffer.statistics, ids, rounds, dropped)

    def write(self, scored: list[Scored], learned: Metrics, clock: RoundClock, workers: Workers) -> None:
        """Write the round to the ledger, its metrics to the trackers, and a checkpoint if one is due."""
        assert self._done is not None, "a round is learned from before it is written"
        batch = whole_round([part for part, _ in scored])
        rollouts = [rollout for _, of_part in scored for rollout in of_part]
        recipe, stream = self._components.recipe, workers.stream
        if self._numerics:
            self._numerics.saw(rollouts)
            self._numerics.rounded(learned)
        images = [stream.images(rollout) for rollout in rollouts] if self._ledger.wants_images(batch.round) else []
        there = [each.pixels for each in images if each is not None]
        weights, floors = self._components.aggregation.weights, self._components.aggregation.floors
        self._ledger.write_round(batch, rollouts, weights, there if len(there) == len(rollouts) else None)
        per_prompt = recipe.prompts.images_per_prompt
        possible = self._components.reward_range
        values = reward_metrics(batch, rollouts, weights, floors, per_prompt, possible) | learned
        values |= refill_metrics(self._refill, rollouts) if self._refill else {}
        memory = memory_now(self._done.learner.weights[-1].buffer.nbytes)
        metrics = round_metrics(batch.round, rollouts, values, clock, stream.report(), memory)
        left_out = set(batch.dropped)
        if self._refill:
            left_out |= set(np.flatnonzero(~self._refill.trained_images(rollouts)).tolist())
        metrics |= self._utilization(rollouts, len(left_out), learned["seconds/learn"], workers.work)
        try:
            self._show(batch, rollouts, workers)
            began = time.monotonic()
            found = self.evaluating.read(batch.round)
            metrics |= found | ({"seconds/evaluation": time.monotonic() - began} if found else {})
        finally:  # even if the run is stopped while it waits for an evaluation, because the round itself is done
            self.metrics.append(metrics)
            self._trackers.log(metrics)
        if says := self.collapse.add(batch.round, metrics["reward/mean"], metrics["reward/std"]):
            print_line(says)
        if says := self._components.algorithm.remark(batch.round, learned):
            print_line(says)
        due = self.rounds_done % recipe.checkpoint.every == 0 or self.rounds_done == recipe.rounds
        self._settle(due or self.evaluating.is_over or self._failed_rounds > 0)

    def _utilization(
        self, rollouts: list[Rollout], left_out: int, learn_seconds: float, work: ImageWork | None
    ) -> Metrics:
        """Return the round's MFU; nothing if the network cannot be counted."""
        if work is None or self._done is None:
            return {}
        machine = self._done.learner.machine
        rank_rate = (machine.matrix_rate if machine else 0.0, self._components.recipe.learner.world_size)
        calls = calls_per_image(self._components.recipe, rollouts[0].report.task.window)  # a round has one window
        return mfu_metrics(rollouts, left_out, (work.sampling_with(calls), work.learning), learn_seconds, rank_rate)

    def _settle(self, due: bool) -> None:
        """Write data that the storage refused before, and a checkpoint if one is due.

        Raises:
            StorageError: the storage refuses permanently, for the third consecutive round, or after the last round.
        """
        try:
            self.flush()
            if due:
                self.commit()
        except StorageError as error:
            self._failed_rounds += 1
            over = self.rounds_done == self._components.recipe.rounds or self.evaluating.is_over
            if over or error.permanent or self._failed_rounds == FAILED_ROUNDS:
                raise
            text = f"not saved: {error}; it is tried again after the next round"
            print_line(text)
        else:
            self._failed_rounds = 0

    def save_good(self, workers: Workers) -> None:
        """Write the weights of the last complete round for diffusers; the learner's come from a failed round."""
        if self._done or self._starts_trained:
            workers.learner.restore_last_round()
            workers.learner.save_policy(self._location)

    @property
    def last_checkpoint(self) -> str:
        """Describe the last committed checkpoint."""
        return (
            f"the last good checkpoint is that of round {self._committed}"
            if self._committed
            else "there is no checkpoint yet"
        )

    def closing_line(self, serial: bool) -> str:
        """Return the last line of a run: that the reward collapsed, else the bottleneck."""
        if collapse := self.collapse.at_end():
            return collapse
        if serial:
            return "one process (--serial): sampling, scoring and learning take turns, so there is nothing to overlap"
        recipe = self._components.recipe
        stochastic = self._components.policy.stochastic_steps(recipe.sampling)
        transitions = self._components.algorithm.transitions_per_image(recipe, stochastic)
        return bottleneck(list(self.metrics), roles_of(recipe, transitions), has_cores_to_overlap(recipe))

    def flush(self) -> None:
        """Write data that the storage refused before."""
        self._unwritten.flush()
        self._trackers.flush()

    def _show(self, batch: TrainBatch, rollouts: list[Rollout], workers: Workers) -> None:
        """Show the round's media, if `[media]` asks for this round and a tracker shows media."""
        table, rounds = self._components.recipe.media, self._components.recipe.rounds
        if table.is_due(batch.round, rounds) and self._trackers.shows:
            images = first_images(rollouts, table.images, workers.stream.images)
            weights, log_ratios = self._components.aggregation.weights, workers.learner.log_ratios()
            self._trackers.show(round_media(batch, rollouts, weights, images, log_ratios))

    def commit(self) -> None:
        """Write a checkpoint of the rounds since the last one, after all data that a resumed run expects before it."""
        self.flush()
        if self._done and self._done.rounds_done > self._committed:
            done = dataclasses.replace(self._done, evaluation=self.evaluating.state, base=self._base)
            save_checkpoint(self._checkpoints, done, self._components.recipe.checkpoint.keep)
            self._committed = self._done.rounds_done
